(* The Cayley retraction: always defined, never leaves the Stiefel manifold,  *)
(* costs a 2p x 2p solve, and commutes with orthogonal factors.               *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices stiefel.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section CayleyTransform.

Variables (F : realFieldType) (n : nat).
Implicit Types W P : 'M[F]_n.

Definition cayley W : 'M[F]_n :=
  invmx (1%:M - 2^-1 *: W) *m (1%:M + 2^-1 *: W).

Lemma skew_scale a W : is_skew W -> is_skew (a *: W).
Proof. by rewrite /is_skew trmxZ => ->; rewrite scalerN. Qed.

Lemma inner_skew W (x : 'cV[F]_n) : is_skew W -> inner x (W *m x) = 0.
Proof.
move=> skewW; have /eqP : inner x (W *m x) = - inner x (W *m x).
  by rewrite {1}innerC inner_mulmxl skewW mulNmx innerNr.
by rewrite -addr_eq0 -mulr2n mulrn_eq0 /= => /eqP.
Qed.

Theorem cayley_invertible W : is_skew W -> (1%:M - 2^-1 *: W) \in unitmx.
Proof.
move=> skewW; apply: injective_unitmx => x.
rewrite mulmxBl mul1mx -scalemxAl => /eqP; rewrite subr_eq0 => /eqP fixed.
by apply: inner_eq0; rewrite {2}fixed innerZr inner_skew ?mulr0.
Qed.

Theorem cayley_orthogonal W : is_skew W -> is_orthogonal (cayley W).
Proof.
move=> skewW; rewrite /cayley.
set A := 1%:M - 2^-1 *: W; set B := 1%:M + 2^-1 *: W.
have unitA : A \in unitmx by apply: cayley_invertible.
have AT : A^T = B by rewrite /A /B trmxB trmx1 trmxZ skewW scalerN opprK.
have unitB : B \in unitmx by rewrite -AT unitmx_tr.
have commute : A *m B = B *m A by rewrite /A /B; linear_combination.
rewrite /is_orthogonal trmx_mul trmx_inv AT -AT trmxK AT.
have -> : A *m invmx B = invmx B *m A.
  by rewrite -[LHS](mulKmx unitB) [B *m (A *m _)]mulmxA -commute mulmxK.
by rewrite -mulmxA mulKVmx // mulVmx.
Qed.

Lemma cayley_equivariant P W :
  is_skew W -> is_orthogonal P ->
  cayley (P *m W *m P^T) = P *m cayley W *m P^T.
Proof.
move=> skewW oP; have PPT := orthogonalC oP.
have unitA := cayley_invertible skewW.
have conjugate a : 1%:M + a *: (P *m W *m P^T) = P *m (1%:M + a *: W) *m P^T.
  rewrite mulmxDr mulmx1 mulmxDl PPT; congr (_ + _).
  by rewrite -scalemxAr -scalemxAl.
have unitPAP : P *m (1%:M - 2^-1 *: W) *m P^T \in unitmx.
  by rewrite !unitmx_mul unitmx_tr unitA orthogonal_unitmx.
rewrite /cayley -scaleNr !conjugate scaleNr.
apply: (can_inj (mulKmx unitPAP)); rewrite mulKVmx //.
rewrite !mulmxA -[_ *m P^T *m P]mulmxA oP mulmx1.
by rewrite -[_ *m _ *m invmx _]mulmxA mulmxV // mulmx1.
Qed.

End CayleyTransform.

Section CayleyOnStiefel.

Variables (F : realFieldType) (d p : nat).
Implicit Types X u : 'M[F]_(d, p).

(* The skew matrix that generates the tangent vector u at X.                  *)
Definition half_normal X u : 'M[F]_(d, p) := u - 2^-1 *: (X *m (X^T *m u)).
Definition generator X u : 'M[F]_d :=
  half_normal X u *m X^T - X *m (half_normal X u)^T.

Definition cayley_retract X u : 'M[F]_(d, p) := cayley (generator X u) *m X.

Lemma generator_skew X u : is_skew (generator X u).
Proof. by rewrite /is_skew /generator trmxB !trmx_mul !trmxK opprB. Qed.

Lemma generator_scale X t u : generator X (t *: u) = t *: generator X u.
Proof. by rewrite /generator /half_normal; linear_combination. Qed.

Theorem generator_velocity X u :
  orthonormal_columns X -> tangent X u -> generator X u *m X = u.
Proof.
move=> oX; rewrite /tangent /is_skew trmx_mul trmxK => skewXu.
have normal : (half_normal X u)^T *m X = - (2^-1 *: (X^T *m u)).
  rewrite /half_normal trmxB trmxZ !trmx_mul trmxK mulmxBl -scalemxAl.
  rewrite -[u^T *m X *m X^T *m X]mulmxA oX mulmx1 skewXu; linear_combination.
rewrite /generator mulmxBl -[_ *m X^T *m X]mulmxA oX mulmx1.
rewrite -[X *m _ *m X]mulmxA normal /half_normal; linear_combination.
Qed.

(* The curve t |-> Cayley(t W) X stays on the manifold for every skew W.      *)
Theorem cayley_curve_on_stiefel X (W : 'M[F]_d) t :
  is_skew W -> orthonormal_columns X ->
  orthonormal_columns (cayley (t *: W) *m X).
Proof.
move=> skewW oX; rewrite /orthonormal_columns trmx_mul -mulmxA.
by rewrite [_^T *m (_ *m X)]mulmxA cayley_orthogonal ?mul1mx //; apply: skew_scale.
Qed.

Theorem cayley_retract_on_stiefel X u :
  orthonormal_columns X -> orthonormal_columns (cayley_retract X u).
Proof.
move=> oX; rewrite /cayley_retract -[generator X u]scale1r.
by apply: cayley_curve_on_stiefel => //; apply: generator_skew.
Qed.

(* First order: the increment is t times a matrix that equals u at t = 0.     *)
Theorem cayley_increment X u t :
  orthonormal_columns X -> tangent X u ->
  cayley_retract X (t *: u) - X =
  t *: (invmx (1%:M - 2^-1 *: (t *: generator X u)) *m u).
Proof.
move=> oX tangent_u; rewrite /cayley_retract /cayley generator_scale.
have skew_tW : is_skew (t *: generator X u) by apply/skew_scale/generator_skew.
have unitA := cayley_invertible skew_tW.
apply: (can_inj (mulKmx unitA)).
rewrite mulmxBr -!mulmxA mulKVmx // -scalemxAr mulKVmx //.
rewrite -{3}(generator_velocity oX tangent_u).
by move: (generator X u) => W; linear_combination.
Qed.

End CayleyOnStiefel.

Section LowRank.

Variables (F : realFieldType) (d k p : nat).
Implicit Types (U V : 'M[F]_(d, k)) (X : 'M[F]_(d, p)).

Lemma low_rank_invertible U V :
  (1%:M - 2^-1 *: (U *m V^T)) \in unitmx ->
  (1%:M - 2^-1 *: (V^T *m U)) \in unitmx.
Proof.
move=> unitA; apply: injective_unitmx => y.
rewrite mulmxBl mul1mx => /eqP; rewrite subr_eq0 => /eqP fixed.
have Uy0 : U *m y = 0.
  rewrite -[U *m y](mulKmx unitA); set A := 1%:M - _.
  suff -> : A *m (U *m y) = 0 by rewrite mulmx0.
  rewrite /A mulmxBl mul1mx {1}fixed -!scalemxAl -scalemxAr !mulmxA.
  exact: subrr.
by rewrite fixed -scalemxAl -mulmxA Uy0 mulmx0 scaler0.
Qed.

(* Sherman-Morrison-Woodbury, in the form the code solves.                    *)
Theorem cayley_low_rank U V X :
  (1%:M - 2^-1 *: (U *m V^T)) \in unitmx ->
  cayley (U *m V^T) *m X =
  X + U *m (invmx (1%:M - 2^-1 *: (V^T *m U)) *m (V^T *m X)).
Proof.
move=> unitA; have unitK := low_rank_invertible unitA.
apply: (can_inj (mulKmx unitA)); rewrite /cayley -mulmxA mulKVmx //.
set K := 1%:M - 2^-1 *: (V^T *m U) in unitK *.
have push : (1%:M - 2^-1 *: (U *m V^T)) *m U = U *m K.
  by rewrite /K; linear_combination.
rewrite mulmxDr [(_ - _) *m (U *m _)]mulmxA push -[U *m K *m _]mulmxA mulKVmx //.
linear_combination.
Qed.

End LowRank.

Section CayleySmallSolve.

Variables (F : realFieldType) (d p : nat).
Implicit Types X u : 'M[F]_(d, p).

Definition left_factor X u : 'M[F]_(d, p + p) := row_mx (half_normal X u) X.
Definition right_factor X u : 'M[F]_(d, p + p) := row_mx X (- half_normal X u).

Lemma generator_factors X u :
  generator X u = left_factor X u *m (right_factor X u)^T.
Proof.
by rewrite /generator tr_row_mx mul_row_col trmxN mulmxN.
Qed.

Theorem cayley_small_solve X u :
  cayley_retract X u =
  X + left_factor X u *m
      (invmx (1%:M - 2^-1 *: ((right_factor X u)^T *m left_factor X u)) *m
       ((right_factor X u)^T *m X)).
Proof.
rewrite /cayley_retract generator_factors cayley_low_rank //.
rewrite -generator_factors; exact/cayley_invertible/generator_skew.
Qed.

(* The small matrix is invertible, whatever the step.                         *)
Theorem cayley_small_invertible X u :
  (1%:M - 2^-1 *: ((right_factor X u)^T *m left_factor X u)) \in unitmx.
Proof.
apply: low_rank_invertible; rewrite -generator_factors.
exact/cayley_invertible/generator_skew.
Qed.

Theorem cayley_retract_equivariant X u (P : 'M[F]_d) (Q : 'M[F]_p) :
  is_orthogonal P -> is_orthogonal Q ->
  cayley_retract (P *m X *m Q) (P *m u *m Q) = P *m cayley_retract X u *m Q.
Proof.
move=> oP oQ; have QQT := orthogonalC oQ.
have half : half_normal (P *m X *m Q) (P *m u *m Q) = P *m half_normal X u *m Q.
  rewrite /half_normal.
  have -> : (P *m X *m Q)^T *m (P *m u *m Q) = Q^T *m (X^T *m u) *m Q.
    by rewrite !trmx_mul !mulmxA -(mulmxA _ P^T P) oP mulmx1.
  rewrite -[P *m X *m Q *m _]mulmxA [Q *m (Q^T *m _ *m _)]mulmxA.
  rewrite [Q *m (Q^T *m _)]mulmxA QQT mul1mx; linear_combination.
have conjugate : generator (P *m X *m Q) (P *m u *m Q) =
                 P *m generator X u *m P^T.
  rewrite /generator half !trmx_mul.
  rewrite -[P *m half_normal X u *m Q *m _]mulmxA -[P *m X *m Q *m _]mulmxA.
  rewrite ![Q *m (Q^T *m _)]mulmxA QQT !mul1mx; linear_combination.
rewrite /cayley_retract conjugate cayley_equivariant //; last exact: generator_skew.
by rewrite !mulmxA -[_ *m P^T *m P]mulmxA oP mulmx1.
Qed.

End CayleySmallSolve.

Section CayleyTall.

Variables (F : realFieldType) (d p : nat).
Implicit Types X N u : 'M[F]_(d, p).

(* The form the code solves: with the tangent split into u = N + X A, where   *)
(* X^T N = 0 and A is skew, the 2p x 2p system reduces to a p x p one.        *)
Definition tall_matrix N (A : 'M[F]_p) : 'M[F]_p :=
  1%:M + 4%:R^-1 *: (N^T *m N) - 2^-1 *: A.

Theorem cayley_tall_invertible N A : is_skew A -> tall_matrix N A \in unitmx.
Proof.
move=> skewA; apply: positive_definite_unitmx => x x_neq0.
rewrite /tall_matrix -scaleNr quadraticD quadraticZ [quadratic A x]quadratic_inner.
rewrite inner_skew // mulr0 addr0.
apply: (positive_definiteD (@positive_definite1 _ _)) => //.
apply: positive_semidefiniteZ; first by rewrite invr_ge0 ler0n.
exact: gram_semidefinite.
Qed.

Theorem cayley_tall_solve X N A :
  orthonormal_columns X -> X^T *m N = 0 -> is_skew A ->
  cayley_retract X (N + X *m A) =
  (2%:R *: X + N) *m invmx (tall_matrix N A) - X.
Proof.
move=> oX horizontalN skewA.
have NTX : N^T *m X = 0 by rewrite -[N^T *m X]trmxK trmx_mul trmxK horizontalN trmx_zero.
set W := generator X (N + X *m A).
have part : X^T *m (N + X *m A) = A.
  by rewrite mulmxDr horizontalN add0r mulmxA oX mul1mx.
have velocity : W *m X = N + X *m A.
  by apply: generator_velocity => //; rewrite /tangent part.
have half : half_normal X (N + X *m A) = N + 2^-1 *: (X *m A).
  by rewrite /half_normal part; linear_combination.
have WN : W *m N = - (X *m (N^T *m N)).
  rewrite /W /generator half mulmxBl -[_ *m X^T *m N]mulmxA horizontalN mulmx0 sub0r.
  rewrite trmxD trmxZ trmx_mul mulmxDr mulmxDl -scalemxAr -scalemxAl.
  by rewrite -!mulmxA horizontalN !mulmx0 scaler0 addr0.
have unitW : 1%:M - 2^-1 *: W \in unitmx by apply/cayley_invertible/generator_skew.
have unitK := cayley_tall_invertible N skewA.
rewrite /cayley_retract -/W; apply: (can_inj (mulKmx unitW)).
rewrite /cayley -mulmxA mulKVmx // mulmxBr mulmxA.
have -> : (1%:M - 2^-1 *: W) *m (2%:R *: X + N) = 2%:R *: (X *m tall_matrix N A).
  rewrite mulmxBl mul1mx -scalemxAl mulmxDr -scalemxAr velocity WN /tall_matrix.
  linear_combination.
rewrite -scalemxAl mulmxK // mulmxDl mulmxBl mul1mx -!scalemxAl velocity.
linear_combination.
Qed.

End CayleyTall.
