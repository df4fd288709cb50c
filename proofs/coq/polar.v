(* The polar factor as a relation: A = Y S with orthonormal columns Y and     *)
(* symmetric positive definite S. It is unique, nearest, commutes with        *)
(* orthogonal factors, and is a square root away from the Gram matrix.        *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices stiefel cholesky_qr spd.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section Polar.

Variables (F : realFieldType) (d p : nat).
Implicit Types A X Y Z u : 'M[F]_(d, p).

Definition is_polar A Y : Prop :=
  orthonormal_columns Y /\
  exists S : 'M[F]_p, [/\ is_symmetric S, positive_definite S & A = Y *m S].

Lemma polar_square_root A Y (S : 'M[F]_p) :
  orthonormal_columns Y -> is_symmetric S -> positive_definite S -> A = Y *m S ->
  is_square_root (A^T *m A) S.
Proof.
move=> oY sS definiteS ->; split=> //.
by rewrite trmx_mul sS -!mulmxA [Y^T *m _]mulmxA oY mul1mx.
Qed.

Theorem polar_unique A Y Z : is_polar A Y -> is_polar A Z -> Y = Z.
Proof.
case=> oY [S [sS definiteS factorS]] [oZ [T [sT definiteT factorT]]].
have rootS := polar_square_root oY sS definiteS factorS.
have rootT := polar_square_root oZ sT definiteT factorT.
have unitS := positive_definite_unitmx definiteS.
rewrite -[Y](mulmxK unitS) -factorS factorT (square_root_unique rootT rootS).
by rewrite mulmxK.
Qed.

Theorem polar_exists A (S : 'M[F]_p) :
  is_square_root (A^T *m A) S -> is_polar A (A *m invmx S).
Proof.
case=> sS definiteS squareS; have unitS := positive_definite_unitmx definiteS.
split; last by exists S; split; rewrite ?mulmxKV.
rewrite /orthonormal_columns trmx_mul (symmetric_invmx sS).
by rewrite -mulmxA [A^T *m _]mulmxA -squareS mulmxK // mulVmx.
Qed.

(* As a retraction it is defined for every tangent step: what is rooted is    *)
(* I + u^T u, positive definite by gram_of_step_definite.                     *)
Theorem polar_of_step X u (S : 'M[F]_p) :
  orthonormal_columns X -> tangent X u ->
  is_square_root (1%:M + u^T *m u) S -> is_polar (X + u) ((X + u) *m invmx S).
Proof. by move=> oX tu root; apply: polar_exists; rewrite gram_of_step. Qed.

(* Nearest: no orthonormal Z is closer to A than its polar factor.            *)
Theorem polar_nearest A Y Z :
  is_polar A Y -> orthonormal_columns Z ->
  inner (A - Y) (A - Y) <= inner (A - Z) (A - Z).
Proof.
case=> oY [S [sS definiteS factor]] oZ.
have lengths (W : 'M[F]_(d, p)) : orthonormal_columns W -> inner W W = inner (1%:M : 'M[F]_p) 1%:M.
  move=> oW; rewrite /inner oW trmx1 mulmx1. done.
have weighted (W : 'M[F]_(d, p)) : orthonormal_columns W -> inner (W *m S) W = inner S 1%:M.
  by move=> oW; rewrite inner_mulmxl oW.
have cross : inner (Z *m S) Y = inner (Y *m S) Z.
  by rewrite inner_mulmxr sS innerC.
(* The weighted square of Y - Z is twice the loss of correlation with A.      *)
have gap : 0 <= inner ((Y - Z) *m S) (Y - Z).
  rewrite -inner_trmx trmx_mul sS innerC.
  exact/inner_semidefinite/positive_definite_semi.
have expanded : inner ((Y - Z) *m S) (Y - Z) =
                2%:R * (inner S 1%:M - inner (Y *m S) Z).
  by rewrite mulmxBl innerBr !innerBl !weighted // cross; ring.
rewrite -subr_ge0; have -> : inner (A - Z) (A - Z) - inner (A - Y) (A - Y) =
                2%:R * (inner S 1%:M - inner (Y *m S) Z).
  rewrite factor !innerBr !innerBl (lengths Y oY) (lengths Z oZ).
  rewrite [inner Z (Y *m S)]innerC [inner Y (Y *m S)]innerC (weighted Y oY).
  ring.
by rewrite -expanded.
Qed.

End Polar.

Section Equivariance.

Variables (F : realFieldType) (d p : nat).

Theorem polar_equivariant k (P : 'M[F]_(k, d)) (Q : 'M[F]_p) (A Y : 'M[F]_(d, p)) :
  orthonormal_columns P -> is_orthogonal Q -> is_polar A Y ->
  is_polar (P *m A *m Q) (P *m Y *m Q).
Proof.
move=> oP oQ [oY [S [sS definiteS factor]]]; split.
  rewrite /orthonormal_columns !trmx_mul -!mulmxA [P^T *m _]mulmxA oP mul1mx.
  by rewrite [Y^T *m _]mulmxA oY mul1mx oQ.
exists (Q^T *m S *m Q); split.
- by rewrite /is_symmetric !trmx_mul trmxK sS mulmxA.
- by apply: congruence_definite => //; apply: orthogonal_unitmx.
rewrite factor -!mulmxA [Q *m (Q^T *m _)]mulmxA orthogonalC //.
by rewrite mul1mx !mulmxA.
Qed.

End Equivariance.

Section PolarRetraction.

Variables (F : realFieldType) (d p : nat).
Variable retract : 'M[F]_(d, p) -> 'M[F]_(d, p) -> 'M[F]_(d, p).
Hypothesis polar_retract : forall X u,
  orthonormal_columns X -> tangent X u -> is_polar (X + u) (retract X u).

(* Whatever algorithm computes the polar factor, it commutes with orthogonal  *)
(* factors, because the factor is unique.                                     *)
Theorem polar_retract_equivariant (P : 'M[F]_d) (Q : 'M[F]_p) X u :
  is_orthogonal P -> is_orthogonal Q -> orthonormal_columns X -> tangent X u ->
  retract (P *m X *m Q) (P *m u *m Q) = P *m retract X u *m Q.
Proof.
move=> oP oQ oX tu; apply: (@polar_unique _ _ _ (P *m X *m Q + P *m u *m Q)).
  apply: polar_retract.
    rewrite /orthonormal_columns !trmx_mul -!mulmxA [P^T *m _]mulmxA oP mul1mx.
    by rewrite [X^T *m _]mulmxA oX mul1mx oQ.
  rewrite /tangent /is_skew !trmx_mul !trmxK -!mulmxA.
  rewrite ![P^T *m (P *m _)]mulmxA oP !mul1mx.
  move: tu; rewrite /tangent /is_skew trmx_mul trmxK => skewXu.
  by rewrite [u^T *m _]mulmxA skewXu mulNmx mulmxN !mulmxA.
have -> : P *m X *m Q + P *m u *m Q = P *m (X + u) *m Q.
  by rewrite mulmxDr mulmxDl.
by apply: polar_equivariant => //; apply: polar_retract.
Qed.

Theorem polar_retract_on_stiefel X u :
  orthonormal_columns X -> tangent X u -> orthonormal_columns (retract X u).
Proof. by move=> oX tu; have [] := polar_retract oX tu. Qed.

End PolarRetraction.
