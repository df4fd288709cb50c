(* Symmetric positive definite matrices: the second-order retraction never    *)
(* leaves the manifold, however long the step; and the symmetric square root  *)
(* that whitens tangents is unique and follows orthogonal changes of basis.   *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices stiefel.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section Retraction.

Variables (F : realFieldType) (n : nat).
Implicit Types M V : 'M[F]_n.

Definition spd_retract M V : 'M[F]_n := M + V + 2^-1 *: (V *m invmx M *m V).

(* Completing the square: half of M plus half of (M + V) M^{-1} (M + V).      *)
Lemma spd_retract_square M V :
  M \in unitmx ->
  spd_retract M V = 2^-1 *: M + 2^-1 *: ((M + V) *m invmx M *m (M + V)).
Proof.
move=> unitM; rewrite /spd_retract mulmxDl mulmxV // mulmxDl mul1mx mulmxDr.
rewrite -[V *m invmx M *m M]mulmxA mulVmx // mulmx1; linear_combination.
Qed.

Theorem spd_retract_symmetric M V :
  is_symmetric M -> is_symmetric V -> is_symmetric (spd_retract M V).
Proof.
move=> sM sV; rewrite /is_symmetric /spd_retract !trmxD trmxZ !trmx_mul.
by rewrite (symmetric_invmx sM) sM sV mulmxA.
Qed.

Theorem spd_retract_definite M V :
  is_symmetric M -> positive_definite M -> is_symmetric V ->
  positive_definite (spd_retract M V).
Proof.
move=> sM definiteM sV; have unitM := positive_definite_unitmx definiteM.
rewrite spd_retract_square //; apply: positive_definiteD.
  by apply: positive_definiteZ; rewrite // invr_gt0 ltr0n.
apply: positive_semidefiniteZ; first by rewrite invr_ge0 ler0n.
have sMV : (M + V)^T = M + V by rewrite trmxD sM sV.
rewrite -{1}sMV; apply: congruence_semidefinite.
exact/positive_definite_semi/positive_definite_invmx.
Qed.

End Retraction.

Section SquareRoot.

Variables (F : realFieldType) (n : nat).
Implicit Types S T M Q : 'M[F]_n.

Definition is_square_root M S : Prop :=
  [/\ is_symmetric S, positive_definite S & S *m S = M].

(* With D = S - T the equation S^2 = T^2 reads S D + D T = 0; its trace       *)
(* against D is a sum of two non-negative terms, so both vanish.              *)
Theorem square_root_unique M S T :
  is_square_root M S -> is_square_root M T -> S = T.
Proof.
case=> sS definiteS squareS [sT definiteT squareT].
apply/eqP; rewrite -subr_eq0; apply/eqP; set D := S - T.
have zero : S *m D + D *m T = 0.
  rewrite /D mulmxBr mulmxBl squareS squareT addrA subrK.
  exact: subrr.
have sD : D^T = D by rewrite /D trmxB sS sT.
have DSD : 0 <= inner D (S *m D).
  exact/inner_semidefinite/positive_definite_semi.
have DDT : 0 <= inner D (D *m T).
  rewrite -inner_trmx trmx_mul sT sD.
  exact/inner_semidefinite/positive_definite_semi.
apply: (inner_definite_eq0 definiteS); apply/eqP.
have /eqP : inner D (S *m D) + inner D (D *m T) = 0.
  by rewrite -innerDr zero inner0r.
by rewrite paddr_eq0 // => /andP[].
Qed.

Theorem square_root_equivariant M S Q :
  is_orthogonal Q -> is_square_root M S ->
  is_square_root (Q *m M *m Q^T) (Q *m S *m Q^T).
Proof.
move=> oQ [sS definiteS squareS]; split.
- by rewrite /is_symmetric !trmx_mul trmxK sS mulmxA.
- rewrite -{1}[Q]trmxK; apply: congruence_definite => //.
  by rewrite unitmx_tr orthogonal_unitmx.
rewrite -squareS !mulmxA -[_ *m Q^T *m Q]mulmxA.
by rewrite oQ mulmx1.
Qed.

End SquareRoot.

Section Whitening.

Variables (F : realFieldType) (n : nat).
Implicit Types S M R U V Q : 'M[F]_n.

(* The affine-invariant metric, and the whitened tangent S^{-1} R S^{-1} in   *)
(* which it becomes the Euclidean one.                                        *)
Definition affine_inner M U V : F := \tr (invmx M *m U *m invmx M *m V).
Definition whiten S R : 'M[F]_n := invmx S *m R *m invmx S.

Theorem whiten_isometry M S U V :
  is_square_root M S -> is_symmetric U ->
  inner (whiten S U) (whiten S V) = affine_inner M U V.
Proof.
case=> sS definiteS <- sU; have unitS := positive_definite_unitmx definiteS.
rewrite /affine_inner /inner /whiten !trmx_mul trmx_inv sS sU.
have -> : invmx (S *m S) = invmx S *m invmx S.
  have unitSS : S *m S \in unitmx by rewrite unitmx_mul unitS.
  apply: (can_inj (mulKmx unitSS)).
  by rewrite mulmxV // mulmxA mulmxK // mulmxV.
by rewrite !mulmxA mxtrace_mulC !mulmxA.
Qed.

Theorem whiten_equivariant M S R Q :
  is_orthogonal Q -> is_square_root M S ->
  whiten (Q *m S *m Q^T) (Q *m R *m Q^T) = Q *m whiten S R *m Q^T.
Proof.
move=> oQ [_ definiteS _]; have unitS := positive_definite_unitmx definiteS.
have inverse : invmx (Q *m S *m Q^T) = Q *m invmx S *m Q^T.
  have unitQSQ : Q *m S *m Q^T \in unitmx.
    by rewrite !unitmx_mul unitmx_tr unitS (orthogonal_unitmx oQ).
  apply: (can_inj (mulKmx unitQSQ)); rewrite mulmxV //.
  rewrite !mulmxA -[_ *m Q^T *m Q]mulmxA oQ mulmx1 mulmxK //.
  by rewrite orthogonalC.
rewrite /whiten inverse !mulmxA -[_ *m Q^T *m Q]mulmxA oQ mulmx1.
by rewrite -[_ *m Q^T *m Q]mulmxA oQ mulmx1.
Qed.

End Whitening.
