(* The Cholesky QR retraction: one p x p factorisation puts X + u back on the *)
(* Stiefel manifold, and the matrix it factorises is never singular.          *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices stiefel.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section CholeskyQR.

Variables (F : realFieldType) (d p : nat).
Implicit Types X u : 'M[F]_(d, p).

Theorem gram_of_step X u :
  orthonormal_columns X -> tangent X u ->
  (X + u)^T *m (X + u) = 1%:M + u^T *m u.
Proof.
move=> oX; rewrite /tangent /is_skew trmx_mul trmxK => skewXu.
rewrite trmxD mulmxDl !mulmxDr oX skewXu.
by rewrite addrA -[1%:M + _ - _]addrA subrr addr0.
Qed.

Theorem gram_of_step_definite u : positive_definite (1%:M + u^T *m u).
Proof.
by apply: positive_definiteD; [apply: positive_definite1 | apply: gram_semidefinite].
Qed.

Lemma gram_of_step_symmetric u : is_symmetric (1%:M + u^T *m u).
Proof. by rewrite /is_symmetric trmxD trmx_mul trmxK trmx1. Qed.

(* Any factor of the Gram matrix serves, the Cholesky factor among them; it   *)
(* is invertible by itself.                                                   *)
Theorem cholesky_factor_unitmx u (L : 'M[F]_p) :
  L *m L^T = 1%:M + u^T *m u -> L \in unitmx.
Proof.
move=> factor; have := positive_definite_unitmx (gram_of_step_definite u).
by rewrite -factor unitmx_mul => /andP[].
Qed.

Theorem cholesky_qr_on_stiefel X u (L : 'M[F]_p) :
  orthonormal_columns X -> tangent X u -> L *m L^T = 1%:M + u^T *m u ->
  orthonormal_columns ((X + u) *m invmx L^T).
Proof.
move=> oX tangent_u factor; have unitL := cholesky_factor_unitmx factor.
rewrite /orthonormal_columns trmx_mul trmx_inv trmxK.
rewrite -mulmxA [(X + u)^T *m _]mulmxA gram_of_step // -factor.
by rewrite -mulmxA mulmxV ?unitmx_tr // mulmx1 mulVmx.
Qed.

(* Outside the tangent space: any full-rank matrix is orthonormalised by a    *)
(* factor of its own Gram matrix.                                             *)
Theorem gram_factor_orthonormalises (A : 'M[F]_(d, p)) (L : 'M[F]_p) :
  L \in unitmx -> L *m L^T = A^T *m A ->
  orthonormal_columns (A *m invmx L^T).
Proof.
move=> unitL factor; rewrite /orthonormal_columns trmx_mul trmx_inv trmxK.
rewrite -mulmxA [A^T *m _]mulmxA -factor.
by rewrite -mulmxA mulmxV ?unitmx_tr // mulmx1 mulVmx.
Qed.

End CholeskyQR.
