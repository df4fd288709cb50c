(* The two packed operations of the kernels, cross and rank2, close under     *)
(* differentiation: every derivative of one is the other. Each operation is   *)
(* additive in every argument (or pair of arguments), so its partial          *)
(* differential is the operation itself on the increment, exactly; the        *)
(* gradient is then the adjoint, which is what the theorems below compute.    *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section Kernels.

Variables (F : realFieldType) (d p : nat).
Implicit Types (A B dA dB g : 'M[F]_(d, p)).
Implicit Types (a u da du gr : 'cV[F]_d) (b v db dv gc : 'cV[F]_p).

(* Parameters as in the kernels: u weighs rows, v weighs columns.             *)
Definition cross_rows A B v : 'cV[F]_d := \col_i \sum_j A i j * B i j * v j 0.
Definition cross_cols A B u : 'cV[F]_p := \col_j \sum_i A i j * B i j * u i 0.
Definition rank2 A a v u b : 'M[F]_(d, p) :=
  \matrix_(i, j) (A i j * (a i 0 * v j 0 + u i 0 * b j 0)).

Lemma inner_column n (x y : 'cV[F]_n) : inner x y = \sum_i x i 0 * y i 0.
Proof. by rewrite inner_sum; apply: eq_bigr => i _; rewrite big_ord1. Qed.

(* The pairing of an output cotangent (gr, gc) with the outputs of cross.     *)
Definition cross_pairing gr gc A B u v : F :=
  inner gr (cross_rows A B v) + inner gc (cross_cols A B u).

Lemma cross_pairing_sum gr gc A B u v :
  cross_pairing gr gc A B u v =
  \sum_i \sum_j A i j * B i j * (gr i 0 * v j 0 + u i 0 * gc j 0).
Proof.
rewrite /cross_pairing !inner_column.
have -> : \sum_j gc j 0 * cross_cols A B u j 0 =
          \sum_i \sum_j A i j * B i j * (u i 0 * gc j 0).
  rewrite [RHS]exchange_big /=; apply: eq_bigr => j _; rewrite mxE mulr_sumr.
  by apply: eq_bigr => i _; entries_to_letters; ring.
rewrite -big_split /=; apply: eq_bigr => i _; rewrite mxE mulr_sumr -big_split /=.
by apply: eq_bigr => j _; entries_to_letters; ring.
Qed.

Lemma rank2_pairing_sum g A a v u b :
  inner g (rank2 A a v u b) =
  \sum_i \sum_j g i j * A i j * (a i 0 * v j 0 + u i 0 * b j 0).
Proof.
rewrite inner_sum; apply: eq_bigr => i _; apply: eq_bigr => j _.
by rewrite mxE mulrA.
Qed.

(* Increments. *)
Theorem cross_additive_A A dA B u v :
  cross_rows (A + dA) B v = cross_rows A B v + cross_rows dA B v /\
  cross_cols (A + dA) B u = cross_cols A B u + cross_cols dA B u.
Proof.
split; apply/colP=> i; rewrite !mxE -big_split /=; apply: eq_bigr => j _;
  by rewrite mxE; entries_to_letters; ring.
Qed.

Theorem cross_symmetric A B u v :
  cross_rows A B v = cross_rows B A v /\ cross_cols A B u = cross_cols B A u.
Proof.
by split; apply/colP=> i; rewrite !mxE; apply: eq_bigr => j _; rewrite (mulrC (A _ _)).
Qed.

Theorem cross_additive_uv A B u du v dv :
  cross_rows A B (v + dv) = cross_rows A B v + cross_rows A B dv /\
  cross_cols A B (u + du) = cross_cols A B u + cross_cols A B du.
Proof.
by split; apply/colP=> i; rewrite !mxE -big_split /=; apply: eq_bigr => j _;
  rewrite mxE mulrDr.
Qed.

Theorem rank2_additive_A A dA a v u b :
  rank2 (A + dA) a v u b = rank2 A a v u b + rank2 dA a v u b.
Proof. by apply/matrixP=> i j; rewrite !mxE mulrDl. Qed.

Theorem rank2_additive_ab A a da v u b db :
  rank2 A (a + da) v u (b + db) = rank2 A a v u b + rank2 A da v u db.
Proof. by apply/matrixP=> i j; rewrite !mxE; entries_to_letters; ring. Qed.

Theorem rank2_additive_vu A a v dv u du b :
  rank2 A a (v + dv) (u + du) b = rank2 A a v u b + rank2 A a dv du b.
Proof. by apply/matrixP=> i j; rewrite !mxE; entries_to_letters; ring. Qed.

(* Row one of the table: gA = rank2(B, gr, v, u, gc), and the same for B.     *)
Theorem cross_adjoint_A gr gc dA B u v :
  cross_pairing gr gc dA B u v = inner dA (rank2 B gr v u gc).
Proof. by rewrite cross_pairing_sum rank2_pairing_sum. Qed.

Theorem cross_adjoint_B gr gc A dB u v :
  cross_pairing gr gc A dB u v = inner dB (rank2 A gr v u gc).
Proof.
rewrite cross_pairing_sum rank2_pairing_sum.
by apply: eq_bigr => i _; apply: eq_bigr => j _; rewrite (mulrC (A i j)).
Qed.

(* (gu, gv) = cross(A, B, gr, gc). *)
Theorem cross_adjoint_uv gr gc A B du dv :
  cross_pairing gr gc A B du dv =
  inner du (cross_rows A B gc) + inner dv (cross_cols A B gr).
Proof.
rewrite -[RHS]/(cross_pairing du dv A B gr gc) !cross_pairing_sum.
by apply: eq_bigr => i _; apply: eq_bigr => j _; entries_to_letters; ring.
Qed.

(* Row two of the table: gA = rank2(g, a, v, u, b). *)
Theorem rank2_adjoint_A g dA a v u b :
  inner g (rank2 dA a v u b) = inner dA (rank2 g a v u b).
Proof.
rewrite !rank2_pairing_sum.
by apply: eq_bigr => i _; apply: eq_bigr => j _; rewrite (mulrC (g i j)).
Qed.

(* (ga, gv) = cross(g, A, a, v): a through the row sums, v through the column *)
(* sums.                                                                      *)
Theorem rank2_adjoint_a g A da v :
  inner g (rank2 A da v 0 0) = inner da (cross_rows g A v).
Proof.
rewrite rank2_pairing_sum inner_column; apply: eq_bigr => i _.
rewrite [in RHS]mxE mulr_sumr; apply: eq_bigr => j _; rewrite !mxE; entries_to_letters; ring.
Qed.

Theorem rank2_adjoint_v g A a dv :
  inner g (rank2 A a dv 0 0) = inner dv (cross_cols g A a).
Proof.
rewrite rank2_pairing_sum inner_column exchange_big /=; apply: eq_bigr => j _.
rewrite [in RHS]mxE mulr_sumr; apply: eq_bigr => i _; rewrite !mxE; entries_to_letters; ring.
Qed.

(* (gu, gb) = cross(g, A, u, b).                                              *)
Theorem rank2_adjoint_u g A du b :
  inner g (rank2 A 0 0 du b) = inner du (cross_rows g A b).
Proof.
rewrite rank2_pairing_sum inner_column; apply: eq_bigr => i _.
rewrite [in RHS]mxE mulr_sumr; apply: eq_bigr => j _; rewrite !mxE; entries_to_letters; ring.
Qed.

Theorem rank2_adjoint_b g A u db :
  inner g (rank2 A 0 0 u db) = inner db (cross_cols g A u).
Proof.
rewrite rank2_pairing_sum inner_column exchange_big /=; apply: eq_bigr => j _.
rewrite [in RHS]mxE mulr_sumr; apply: eq_bigr => i _; rewrite !mxE; entries_to_letters; ring.
Qed.

(* The partial increments above are those of the whole map: what changes when *)
(* one argument moves does not depend on the other pair.                      *)
Theorem rank2_increment_a A a da v u b :
  rank2 A (a + da) v u b - rank2 A a v u b = rank2 A da v 0 0.
Proof. by apply/matrixP=> i j; rewrite !mxE; entries_to_letters; ring. Qed.

Theorem rank2_increment_v A a v dv u b :
  rank2 A a (v + dv) u b - rank2 A a v u b = rank2 A a dv 0 0.
Proof. by apply/matrixP=> i j; rewrite !mxE; entries_to_letters; ring. Qed.

Theorem rank2_increment_u A a v u du b :
  rank2 A a v (u + du) b - rank2 A a v u b = rank2 A 0 0 du b.
Proof. by apply/matrixP=> i j; rewrite !mxE; entries_to_letters; ring. Qed.

Theorem rank2_increment_b A a v u b db :
  rank2 A a v u (b + db) - rank2 A a v u b = rank2 A 0 0 u db.
Proof. by apply/matrixP=> i j; rewrite !mxE; entries_to_letters; ring. Qed.

End Kernels.

Section Uses.

Variables (F : realFieldType) (d p : nat).
Implicit Type R : 'M[F]_(d, p).

(* The statistics and the scaling of the method are instances.                *)
Theorem statistics_are_cross R i j :
  cross_rows R R (const_mx 1) i 0 = (R *m R^T) i i /\
  cross_cols R R (const_mx 1) j 0 = (R^T *m R) j j.
Proof.
split; rewrite !mxE; apply: eq_bigr => k _; rewrite !mxE; entries_to_letters; ring.
Qed.

Theorem scaling_is_rank2 R (l : 'cV[F]_d) (k : 'cV[F]_p) :
  rank2 R l k 0 0 = diag_mx l^T *m R *m diag_mx k^T.
Proof.
by apply/matrixP=> i j; rewrite mul_diag_mx mul_mx_diag !mxE; entries_to_letters; ring.
Qed.

End Uses.
