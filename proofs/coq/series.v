(* Meta-gradients: the algebra behind the truncated Neumann series and behind *)
(* the memory of segment recomputation.                                       *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory Order.TotalTheory.
Local Open Scope ring_scope.

Section Neumann.

Variables (F : realFieldType) (n : nat).
Implicit Types (A : 'M[F]_n.+1) (v : 'cV[F]_n.+1).

Definition truncated_neumann A K : 'M[F]_n.+1 := \sum_(k < K) A ^+ k.

Theorem neumann_telescopes A K :
  (1 - A) * truncated_neumann A K = 1 - A ^+ K.
Proof. by rewrite -[LHS]opprK -mulNr opprB -subrX1 opprB. Qed.

(* What is missing after K terms is A^K times the full answer.                *)
Theorem neumann_error A K :
  1 - A \is a GRing.unit ->
  (1 - A)^-1 - truncated_neumann A K = (1 - A)^-1 * A ^+ K.
Proof.
move=> unit; rewrite -[truncated_neumann A K](mulKr unit) neumann_telescopes.
by rewrite mulrBr mulr1 opprB addrCA subrr addr0.
Qed.

(* A contraction in the Euclidean norm (squared factor q < 1) makes 1 - A     *)
(* invertible, and the truncation error falls like q^K.                       *)
Definition contracts A (q : F) : Prop :=
  forall v, inner (A *m v) (A *m v) <= q * inner v v.

Lemma contraction_power A q K v :
  0 <= q -> contracts A q ->
  inner (A ^+ K *m v) (A ^+ K *m v) <= q ^+ K * inner v v.
Proof.
move=> q_ge0 contraction; elim: K => [|K IH]; first by rewrite !expr0 mul1mx mul1r.
have -> : A ^+ K.+1 *m v = A *m (A ^+ K *m v) by rewrite exprS -mulmxE mulmxA.
apply: le_trans (contraction _) _.
by rewrite exprS -mulrA ler_wpmul2l.
Qed.

Theorem contraction_invertible A q :
  q < 1 -> contracts A q -> 1 - A \is a GRing.unit.
Proof.
move=> q_lt1 contraction; apply: injective_unitmx => v.
rewrite mulmxBl mul1mx => /eqP; rewrite subr_eq0 => /eqP fixed.
apply/eqP; apply: contraT => /inner_gt0 v_gt0.
have := contraction v; rewrite -fixed.
by rewrite -[X in X <= _]mul1r ler_pmul2r // leNgt q_lt1.
Qed.

(* With v the exact solution x = (1 - A)^{-1} b, the series of K terms misses *)
(* it by A^K x, at most q^K of its squared length.                            *)
Theorem neumann_error_bound A q K (x b : 'cV[F]_n.+1) :
  0 <= q -> q < 1 -> contracts A q -> x - A *m x = b ->
  inner (x - truncated_neumann A K *m b) (x - truncated_neumann A K *m b) <=
  q ^+ K * inner x x.
Proof.
move=> q_ge0 q_lt1 contraction solves.
have unit := contraction_invertible q_lt1 contraction.
have solution : x = (1 - A)^-1 *m b.
  have -> : b = (1 - A) *m x by rewrite mulmxBl mul1mx.
  by rewrite mulmxA mulmxE mulVr // mul1mx.
have commute : GRing.comm (1 - A)^-1 (A ^+ K).
  apply: commrX; apply/commr_sym/commrV; apply: commrB; last exact: commr_refl.
  exact: commr1.
have -> : x - truncated_neumann A K *m b = A ^+ K *m x.
  by rewrite solution -mulmxBl neumann_error // commute -mulmxE -mulmxA.
exact: contraction_power.
Qed.

End Neumann.

Section Segments.

Variable F : realFieldType.

(* Keeping T/k carries and recomputing k steps inside: never fewer than       *)
(* 2 sqrt T live states, and k = sqrt T attains it.                           *)
Theorem segment_memory_lower (T k : F) :
  0 < k -> 4%:R * T <= (T / k + k) ^+ 2.
Proof.
move=> k_gt0; rewrite -subr_ge0.
have -> : (T / k + k) ^+ 2 - 4%:R * T = (T / k - k) ^+ 2.
  by field; rewrite lt0r_neq0.
exact: sqr_ge0.
Qed.

Theorem segment_memory_attained (k : F) :
  0 < k -> k ^+ 2 / k + k = 2%:R * k.
Proof. by move=> k_gt0; field; rewrite lt0r_neq0. Qed.

End Segments.
