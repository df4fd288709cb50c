(* Grassmann: the horizontal projection, and column scales taken in an        *)
(* eigenbasis of R^T R. Unlike diagonal column scales they do not depend on   *)
(* the representative: the direction follows X -> X Q.                        *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices stiefel.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section Horizontal.

Variables (F : realFieldType) (d p : nat).
Implicit Types X U V : 'M[F]_(d, p).

Definition horizontal X V : Prop := X^T *m V = 0.
Definition horizontal_project X V : 'M[F]_(d, p) := V - X *m (X^T *m V).

Theorem horizontal_project_horizontal X V :
  orthonormal_columns X -> horizontal X (horizontal_project X V).
Proof.
by rewrite /horizontal /horizontal_project mulmxBr mulmxA => ->; rewrite mul1mx subrr.
Qed.

Theorem horizontal_project_idempotent X V :
  orthonormal_columns X ->
  horizontal_project X (horizontal_project X V) = horizontal_project X V.
Proof.
move=> oX; rewrite {1}/horizontal_project horizontal_project_horizontal //.
by rewrite mulmx0 subr0.
Qed.

Theorem horizontal_project_self_adjoint X U V :
  inner (horizontal_project X U) V = inner U (horizontal_project X V).
Proof.
rewrite /horizontal_project innerBl innerBr; congr (_ - _).
by rewrite inner_mulmxl [RHS]innerC [RHS]inner_mulmxl innerC.
Qed.

Theorem grassmann_riesz X G V :
  horizontal X V -> inner (horizontal_project X G) V = inner G V.
Proof.
rewrite horizontal_project_self_adjoint /horizontal_project => ->.
by rewrite mulmx0 subr0.
Qed.

Theorem horizontal_project_equivariant X V (Q : 'M[F]_p) :
  is_orthogonal Q ->
  horizontal_project (X *m Q) (V *m Q) = horizontal_project X V *m Q.
Proof.
move=> oQ; rewrite /horizontal_project trmx_mul.
rewrite -[X *m Q *m _]mulmxA -[Q^T *m X^T *m _]mulmxA [Q *m (Q^T *m _)]mulmxA.
by rewrite orthogonalC // mul1mx mulmxBl !mulmxA.
Qed.

End Horizontal.

Section Eigenbasis.

Variables (F : realFieldType) (d p : nat).
Implicit Types (R : 'M[F]_(d, p)) (S V Q : 'M[F]_p) (lambda : 'rV[F]_p).

Definition spectral S V lambda : Prop :=
  is_orthogonal V /\ S = V *m diag_mx lambda *m V^T.

Definition spectral_function (h : F -> F) V lambda : 'M[F]_p :=
  V *m diag_mx (map_mx h lambda) *m V^T.

(* Any intertwiner of two diagonal matrices intertwines every function of     *)
(* them: where its entry is not zero, the two eigenvalues agree.              *)
Lemma diagonal_intertwiner (h : F -> F) (lambda mu : 'rV[F]_p) (T : 'M[F]_p) :
  diag_mx lambda *m T = T *m diag_mx mu ->
  diag_mx (map_mx h lambda) *m T = T *m diag_mx (map_mx h mu).
Proof.
move/matrixP=> intertwine; apply/matrixP=> i j; have := intertwine i j.
rewrite !mul_diag_mx !mul_mx_diag !mxE mulrC.
have [-> _|T_neq0 /(mulfI T_neq0) ->] := eqVneq (T i j) 0.
  by rewrite mulr0 mul0r.
by rewrite mulrC.
Qed.

Theorem spectral_function_intertwines (h : F -> F) S V lambda S' V' lambda' Q :
  spectral S V lambda -> spectral S' V' lambda' ->
  S *m Q = Q *m S' ->
  spectral_function h V lambda *m Q = Q *m spectral_function h V' lambda'.
Proof.
case=> oV -> [oV' ->] intertwine; set T := V^T *m Q *m V'.
have : diag_mx lambda *m T = T *m diag_mx lambda'.
  have := congr1 (fun M => V^T *m M *m V') intertwine.
  rewrite !mulmxA oV mul1mx -[_ *m V'^T *m V']mulmxA oV' mulmx1 => step.
  by rewrite /T step.
move/(diagonal_intertwiner h); rewrite /T /spectral_function => functions.
have := congr1 (fun M => V *m M *m V'^T) functions.
rewrite !mulmxA -[_ *m V' *m V'^T]mulmxA orthogonalC // mulmx1 => ->.
by rewrite orthogonalC // mul1mx.
Qed.

(* The eigenbasis does not matter, even with repeated eigenvalues.            *)
Theorem spectral_function_well_defined (h : F -> F) S V lambda V' lambda' :
  spectral S V lambda -> spectral S V' lambda' ->
  spectral_function h V lambda = spectral_function h V' lambda'.
Proof.
move=> spectralV spectralV'.
have := @spectral_function_intertwines h _ _ _ _ _ _ 1%:M spectralV spectralV'.
by rewrite !mulmx1 !mul1mx; apply.
Qed.

(* Rows are scaled coordinate by coordinate, from their own mean energy and   *)
(* the matrix mean; columns in the eigenbasis, from the eigenvalue and the    *)
(* same mean. The mean energy does not depend on the representative.          *)
Definition mean_energy R : F := inner R R / (d * p)%:R.
Definition row_energy R i : F := (R *m R^T) i i / p%:R.

Definition eigenbasis_direction (l h : F -> F -> F) R V lambda : 'M[F]_(d, p) :=
  diag_mx (\row_i l (mean_energy R) (row_energy R i)) *m R *m
  spectral_function (h (mean_energy R)) V lambda.

Theorem eigenbasis_direction_equivariant (l h : F -> F -> F) R Q V lambda V' lambda' :
  is_orthogonal Q ->
  spectral (R^T *m R) V lambda -> spectral ((R *m Q)^T *m (R *m Q)) V' lambda' ->
  eigenbasis_direction l h (R *m Q) V' lambda' =
  eigenbasis_direction l h R V lambda *m Q.
Proof.
move=> oQ spectralR spectralRQ; have QQT := orthogonalC oQ.
have same_rows : R *m Q *m (R *m Q)^T = R *m R^T.
  by rewrite trmx_mul !mulmxA -[_ *m Q *m Q^T]mulmxA QQT mulmx1.
have same_mean : mean_energy (R *m Q) = mean_energy R.
  rewrite /mean_energy; congr (_ / _).
  by rewrite inner_mulmxr -mulmxA QQT mulmx1.
rewrite /eigenbasis_direction same_mean.
have -> : (\row_i l (mean_energy R) (row_energy (R *m Q) i)) =
          (\row_i l (mean_energy R) (row_energy R i)).
  by apply/rowP=> i; rewrite !mxE /row_energy same_rows.
rewrite -[RHS]mulmxA (spectral_function_intertwines _ spectralR spectralRQ).
  by rewrite !mulmxA.
by rewrite trmx_mul !mulmxA QQT mul1mx.
Qed.

(* The same for the horizontal direction at X Q.                              *)
Theorem grassmann_direction_equivariant (l h : F -> F -> F)
    (X G : 'M[F]_(d, p)) Q V lambda V' lambda' :
  let R := horizontal_project X G in
  is_orthogonal Q ->
  spectral (R^T *m R) V lambda -> spectral ((R *m Q)^T *m (R *m Q)) V' lambda' ->
  horizontal_project (X *m Q)
    (eigenbasis_direction l h (horizontal_project (X *m Q) (G *m Q)) V' lambda') =
  horizontal_project X (eigenbasis_direction l h R V lambda) *m Q.
Proof.
move=> R oQ spectralR spectralRQ; rewrite horizontal_project_equivariant //.
rewrite (eigenbasis_direction_equivariant l h oQ spectralR spectralRQ).
exact: horizontal_project_equivariant.
Qed.

(* Column scales never leave the horizontal space: only row scales need the   *)
(* projection.                                                                *)
Theorem column_scales_stay_horizontal (h : F -> F) (X R : 'M[F]_(d, p)) V lambda :
  horizontal X R -> horizontal X (R *m spectral_function h V lambda).
Proof. by rewrite /horizontal mulmxA => ->; rewrite mul0mx. Qed.

End Eigenbasis.
