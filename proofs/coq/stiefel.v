(* The Stiefel manifold with its embedded and its canonical metric: tangent   *)
(* projection, Riemannian gradients, and the coordinates in which the         *)
(* canonical metric is Euclidean. The Grassmann projection at the end.        *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section Stiefel.

Variables (F : realFieldType) (d p : nat).
Implicit Types X U V G : 'M[F]_(d, p).

(* The tangent space at X, got by differentiating X^T X = I.                  *)
Definition tangent X V : Prop := is_skew (X^T *m V).

Definition project X V : 'M[F]_(d, p) := V - X *m sym (X^T *m V).

Definition canonical_inner X U V : F :=
  inner U (V - 2^-1 *: (X *m (X^T *m V))).

Definition canonical_gradient X G : 'M[F]_(d, p) := G - X *m (G^T *m X).

Lemma canonical_innerE X U V :
  canonical_inner X U V = inner U V - 2^-1 * inner (X^T *m U) (X^T *m V).
Proof.
rewrite /canonical_inner innerBr innerZr; congr (_ - _ * _).
by rewrite [RHS]inner_mulmxl trmxK.
Qed.

Lemma canonical_innerC X U V : canonical_inner X U V = canonical_inner X V U.
Proof. by rewrite !canonical_innerE innerC [in X in _ - X]innerC. Qed.

Lemma canonical_innerBl X U V G :
  canonical_inner X (U - V) G = canonical_inner X U G - canonical_inner X V G.
Proof. by rewrite /canonical_inner innerBl. Qed.

Theorem project_tangent X V : orthonormal_columns X -> tangent X (project X V).
Proof.
rewrite /tangent /project mulmxBr mulmxA => ->; rewrite mul1mx.
exact: skew_part.
Qed.

Theorem project_fixes_tangent X V : tangent X V -> project X V = V.
Proof. by rewrite /project => /sym_skew ->; rewrite mulmx0 subr0. Qed.

Theorem project_idempotent X V :
  orthonormal_columns X -> project X (project X V) = project X V.
Proof. by move=> oX; apply/project_fixes_tangent/project_tangent. Qed.

Lemma tangent_linear X a U V : tangent X U -> tangent X V -> tangent X (a *: U + V).
Proof.
rewrite /tangent /is_skew mulmxDr -scalemxAr trmxD trmxZ => -> ->.
by rewrite opprD scalerN.
Qed.

Theorem project_self_adjoint X U V :
  inner (project X U) V = inner U (project X V).
Proof.
rewrite /project innerBl innerBr; congr (_ - _).
by rewrite inner_mulmxl inner_sym inner_mulmxl trmxK.
Qed.

(* What is removed is orthogonal to the tangent space: the projection is the  *)
(* nearest tangent vector.                                                    *)
Theorem project_residual_orthogonal X U V :
  tangent X V -> inner (U - project X U) V = 0.
Proof.
move=> tangentV; rewrite /project opprB addrCA subrr addr0 inner_mulmxl.
by apply: inner_symmetric_skew => //; apply: sym_is_symmetric.
Qed.

(* Embedded metric: the projection of the Euclidean gradient represents the   *)
(* differential V |-> <G, V>, and nothing else does.                          *)
Theorem embedded_riesz X G V :
  tangent X V -> inner (project X G) V = inner G V.
Proof. by move=> tangentV; rewrite project_self_adjoint project_fixes_tangent. Qed.

Theorem embedded_gradient_unique X G R :
  orthonormal_columns X -> tangent X R ->
  (forall V, tangent X V -> inner R V = inner G V) -> R = project X G.
Proof.
move=> oX tangentR rieszR; apply/eqP; rewrite -subr_eq0; apply/eqP/inner_eq0.
have tangent_difference : tangent X (R - project X G).
  rewrite addrC -scaleN1r; apply: tangent_linear => //; exact: project_tangent.
by rewrite innerBl rieszR // embedded_riesz // subrr.
Qed.

(* Canonical metric. It is positive on all of R^{d x p}, not only on tangents.*)
Theorem canonical_inner_lower_bound X U :
  orthonormal_columns X -> 2^-1 * inner U U <= canonical_inner X U U.
Proof.
move=> oX; rewrite canonical_innerE -subr_ge0.
have -> : inner U U - 2^-1 * inner (X^T *m U) (X^T *m U) - 2^-1 * inner U U =
          2^-1 * (inner U U - inner (X^T *m U) (X^T *m U)) by field.
by rewrite mulr_ge0 ?invr_ge0 ?ler0n // subr_ge0 inner_projected_le.
Qed.

Lemma canonical_inner_eq0 X U :
  orthonormal_columns X -> canonical_inner X U U = 0 -> U = 0.
Proof.
move=> oX zero; have := canonical_inner_lower_bound U oX; rewrite zero.
rewrite pmulr_rle0 ?invr_gt0 ?ltr0n // => le0.
by apply/inner_eq0/le_anti; rewrite le0 inner_ge0.
Qed.

Theorem canonical_gradient_tangent X G :
  orthonormal_columns X -> tangent X (canonical_gradient X G).
Proof.
rewrite /tangent /is_skew /canonical_gradient => oX.
by rewrite mulmxBr mulmxA oX mul1mx trmxB !trmx_mul !trmxK opprB.
Qed.

Theorem canonical_riesz X G V :
  orthonormal_columns X -> tangent X V ->
  canonical_inner X (canonical_gradient X G) V = inner G V.
Proof.
move=> oX tangentV.
(* With S = X^T G: the missing part is <S^T, K> + <S - S^T, K>/2 for the      *)
(* skew K = X^T V, that is the product of the symmetric part of S with K.     *)
set S := X^T *m G; set K := X^T *m V.
have S_part : X^T *m canonical_gradient X G = S - S^T.
  by rewrite /canonical_gradient mulmxBr mulmxA oX mul1mx /S trmx_mul trmxK.
rewrite canonical_innerE S_part -/K {1}/canonical_gradient innerBl.
have -> : inner (X *m (G^T *m X)) V = inner S^T K.
  by rewrite inner_mulmxl /S trmx_mul trmxK.
have zero : inner (sym S) K = 0.
  by apply: inner_symmetric_skew => //; apply: sym_is_symmetric.
rewrite innerBl; move: zero; rewrite /sym innerZl innerDl => zero.
have -> : inner G V - inner S^T K - 2^-1 * (inner S K - inner S^T K) =
          inner G V - 2^-1 * (inner S K + inner S^T K) by field.
by rewrite zero subr0.
Qed.

Theorem canonical_gradient_unique X G R :
  orthonormal_columns X -> tangent X R ->
  (forall V, tangent X V -> canonical_inner X R V = inner G V) ->
  R = canonical_gradient X G.
Proof.
move=> oX tangentR rieszR; apply/eqP; rewrite -subr_eq0; apply/eqP.
have tangent_difference : tangent X (R - canonical_gradient X G).
  rewrite addrC -scaleN1r; apply: tangent_linear => //.
  exact: canonical_gradient_tangent.
apply: (canonical_inner_eq0 oX).
by rewrite canonical_innerBl rieszR // canonical_riesz // subrr.
Qed.

(* The orthogonal projection is the same one for both metrics: what it        *)
(* removes, X S with S symmetric, is canonically orthogonal to tangents too.  *)
Theorem project_residual_canonically_orthogonal X U V :
  orthonormal_columns X -> tangent X V ->
  canonical_inner X (U - project X U) V = 0.
Proof.
move=> oX tangentV; rewrite canonical_innerE project_residual_orthogonal //.
rewrite /project opprB addrCA subrr addr0 mulmxA oX mul1mx.
rewrite [inner (sym _) _]inner_symmetric_skew ?mulr0 ?subr0 //.
exact: sym_is_symmetric.
Qed.

Theorem project_canonically_self_adjoint X U V :
  orthonormal_columns X ->
  canonical_inner X (project X U) V = canonical_inner X U (project X V).
Proof.
move=> oX.
have split W Z : canonical_inner X (project X W) Z =
                 canonical_inner X (project X W) (project X Z).
  apply/eqP; rewrite -subr_eq0 !(canonical_innerC X (project X W)).
  rewrite -canonical_innerBl.
  by rewrite project_residual_canonically_orthogonal //; apply: project_tangent.
by rewrite split canonical_innerC -split canonical_innerC.
Qed.

(* Coordinates in which the canonical metric is Euclidean. The library takes  *)
(* c = 1 - 1/sqrt 2; all that is used of c is (1 - c)^2 = 1/2.                *)
Definition coordinates c X V : 'M[F]_(d, p) := V - c *: (X *m (X^T *m V)).

Theorem coordinates_isometry c X U V :
  orthonormal_columns X -> (1 - c) ^+ 2 = 2^-1 ->
  inner (coordinates c X U) (coordinates c X V) = canonical_inner X U V.
Proof.
move=> oX half; rewrite canonical_innerE /coordinates.
rewrite innerBl !innerBr !innerZl !innerZr.
have -> : inner (X *m (X^T *m U)) V = inner (X^T *m U) (X^T *m V).
  by rewrite inner_mulmxl.
have -> : inner U (X *m (X^T *m V)) = inner (X^T *m U) (X^T *m V).
  by rewrite [RHS]inner_mulmxl trmxK.
have -> : inner (X *m (X^T *m U)) (X *m (X^T *m V)) = inner (X^T *m U) (X^T *m V).
  by rewrite inner_mulmxl mulmxA oX mul1mx.
have -> : 2^-1 = 1 - (1 - c) ^+ 2 :> F by rewrite half; field.
by move: (inner U V) (inner (X^T *m U) _) => a b; ring.
Qed.

(* The inverse: V + c' X X^T V with (1 + c')(1 - c) = 1, so c' = sqrt 2 - 1.  *)
Theorem coordinates_inverse c c' X V :
  orthonormal_columns X -> (1 + c') * (1 - c) = 1 ->
  coordinates (- c') X (coordinates c X V) = V.
Proof.
move=> oX inverse; rewrite /coordinates.
rewrite mulmxBr -[X^T *m (c *: _)]scalemxAr [X^T *m (X *m _)]mulmxA oX mul1mx.
rewrite mulmxBr -scalemxAr; set Y := X *m (X^T *m V).
have c_prime : - c' * (1 - c) + c = 0.
  by rewrite -[RHS](subrr 1) -[X in _ = _ - X]inverse; ring.
have -> : V - c *: Y - - c' *: (Y - c *: Y) = V - (- c' * (1 - c) + c) *: Y.
  by clearbody Y; linear_combination.
by rewrite c_prime scale0r subr0.
Qed.

End Stiefel.

Section Equivariance.

Variables (F : realFieldType) (d p : nat).
Implicit Types X V : 'M[F]_(d, p).

(* Orthogonal factors on both sides carry one tangent space to another. The   *)
(* left factor may even be a tall one with orthonormal columns.               *)
Theorem project_equivariant k (P : 'M[F]_(k, d)) (Q : 'M[F]_p) X V :
  orthonormal_columns P -> is_orthogonal Q ->
  project (P *m X *m Q) (P *m V *m Q) = P *m project X V *m Q.
Proof.
move=> oP oQ; rewrite /project.
have -> : (P *m X *m Q)^T *m (P *m V *m Q) = Q^T *m (X^T *m V) *m Q.
  by rewrite !trmx_mul !mulmxA -(mulmxA _ P^T P) oP mulmx1.
have -> : sym (Q^T *m (X^T *m V) *m Q) = Q^T *m sym (X^T *m V) *m Q.
  by rewrite /sym; linear_combination.
rewrite -!mulmxA [Q *m (Q^T *m _)]mulmxA orthogonalC // mul1mx.
by rewrite mulmxBl mulmxBr !mulmxA.
Qed.

Theorem canonical_gradient_equivariant k (P : 'M[F]_(k, d)) (Q : 'M[F]_p) X V :
  orthonormal_columns P -> is_orthogonal Q ->
  canonical_gradient (P *m X *m Q) (P *m V *m Q) =
  P *m canonical_gradient X V *m Q.
Proof.
move=> oP oQ; rewrite /canonical_gradient.
have -> : (P *m V *m Q)^T *m (P *m X *m Q) = Q^T *m (V^T *m X) *m Q.
  by rewrite !trmx_mul !mulmxA -(mulmxA _ P^T P) oP mulmx1.
rewrite -!mulmxA [Q *m (Q^T *m _)]mulmxA orthogonalC // mul1mx.
by rewrite mulmxBl mulmxBr !mulmxA.
Qed.

End Equivariance.

Section SquareRoot.

Variables (F : rcfType) (d p : nat).

(* The constants as they stand in the code.                                   *)
Lemma canonical_constant : (1 - (1 - (Num.sqrt 2)^-1)) ^+ 2 = 2^-1 :> F.
Proof. by rewrite subKr exprVn sqr_sqrtr ?ler0n. Qed.

Lemma canonical_inverse_constant :
  (1 + (Num.sqrt 2 - 1)) * (1 - (1 - (Num.sqrt 2)^-1)) = 1 :> F.
Proof. by rewrite subKr addrC subrK mulfV // gt_eqF // sqrtr_gt0 ltr0n. Qed.

Theorem canonical_coordinates_isometry (X U V : 'M[F]_(d, p)) :
  orthonormal_columns X ->
  inner (coordinates (1 - (Num.sqrt 2)^-1) X U)
        (coordinates (1 - (Num.sqrt 2)^-1) X V) = canonical_inner X U V.
Proof. by move=> oX; apply: coordinates_isometry oX canonical_constant. Qed.

Theorem canonical_coordinates_inverse (X V : 'M[F]_(d, p)) :
  orthonormal_columns X ->
  coordinates (- (Num.sqrt 2 - 1)) X (coordinates (1 - (Num.sqrt 2)^-1) X V) = V.
Proof. by move=> oX; apply: coordinates_inverse oX canonical_inverse_constant. Qed.

End SquareRoot.
