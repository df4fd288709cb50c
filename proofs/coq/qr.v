(* The thin QR factorisation with positive diagonal does not follow column    *)
(* permutations, so a QR update is not equivariant; polar and Cayley are.     *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices stiefel rational.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section QR.

Variables (F : realFieldType) (d p : nat).
Implicit Types A Q : 'M[F]_(d, p).

Definition upper_triangular (R : 'M[F]_p) : Prop :=
  forall i j : 'I_p, (j < i)%N -> R i j = 0.

Definition is_qr A Q (R : 'M[F]_p) : Prop :=
  [/\ orthonormal_columns Q, upper_triangular R,
      forall i, 0 < R i i & A = Q *m R].

(* If the factor follows a permutation of the columns, every pair of columns  *)
(* whose order the permutation inverts must have a zero in R.                 *)
Theorem qr_follows_only_if A Q (R R' : 'M[F]_p) (s : 'S_p) i j :
  is_qr A Q R -> is_qr (A *m perm_mx s) (Q *m perm_mx s) R' ->
  (s j < s i)%N -> R i j = 0.
Proof.
case=> oQ _ _ -> [_ triangular _ factor] inverted.
have := congr1 (mulmx Q^T) factor.
rewrite -!mulmxA [Q^T *m _]mulmxA [Q^T *m (Q *m (_ *m R'))]mulmxA oQ !mul1mx.
move=> conjugate; rewrite -(triangular _ _ inverted).
have /matrixP/(_ i (s j)) := conjugate.
rewrite -row_permE -{1}[s]invgK -col_permE !mxE => <-.
by rewrite permK.
Qed.

End QR.

Section CounterExample.

(* A point of St(5, 2), a tangent there, both over the rationals; all QR      *)
(* factors involved are rational.                                             *)
Definition example_point : 'M[rat]_(5, 2) := integer_matrix 5 2
  [:: [:: 1; 0]; [:: 0; 1]; [:: 0; 0]; [:: 0; 0]; [:: 0; 0]].
Definition example_tangent : 'M[rat]_(5, 2) := integer_matrix 5 2
  [:: [:: 0; 0]; [:: 0; 0]; [:: 1; 4]; [:: 1; 2]; [:: 1; 2]].

Definition example_swap : 'S_2 := tperm 0 1.

(* The QR factor of the step, and of the step with its columns swapped, up to *)
(* the factors 1/6 and 1/30: computing with whole numbers is what is quick.   *)
Definition example_whole : 'M[rat]_(5, 2) := integer_matrix 5 2
  [:: [:: 3; -4]; [:: 0; 2]; [:: 3; 4]; [:: 3; 0]; [:: 3; 0]].
Definition example_whole_swapped : 'M[rat]_(5, 2) := integer_matrix 5 2
  [:: [:: 0; 25]; [:: 6; -8]; [:: 24; -7]; [:: 12; 9]; [:: 12; 9]].
Definition example_qr : 'M[rat]_(5, 2) := 6%:R^-1 *: example_whole.
Definition example_qr_swapped : 'M[rat]_(5, 2) := 30%:R^-1 *: example_whole_swapped.

Lemma scaled_orthonormal (c : rat) (N : 'M[rat]_(5, 2)) :
  c != 0 -> N^T *m N = c ^+ 2 *: 1%:M -> orthonormal_columns (c^-1 *: N).
Proof.
move=> c_neq0 square; rewrite /orthonormal_columns trmxZ -scalemxAl -scalemxAr.
by rewrite square !scalerA -[RHS]scale1r; congr (_ *: _); field.
Qed.

Lemma example_point_on_stiefel : orthonormal_columns example_point.
Proof. by compute_entries. Qed.

Lemma example_tangent_is_tangent : tangent example_point example_tangent.
Proof. by compute_entries. Qed.

Definition example_triangle : 'M[rat]_2 :=
  integer_matrix 2 2 [:: [:: 2; 4]; [:: 0; 3]].
Definition example_whole_triangle : 'M[rat]_2 :=
  integer_matrix 2 2 [:: [:: 25; 8]; [:: 0; 6]].
Definition example_triangle_swapped : 'M[rat]_2 := 5%:R^-1 *: example_whole_triangle.

Lemma example_is_qr :
  is_qr (example_point + example_tangent) example_qr example_triangle.
Proof.
split.
- by apply: scaled_orthonormal => //; compute_entries.
- by move=> [[|[|//]] ?] [[|[|//]] ?]; rewrite // mxE.
- by move=> [[|[|//]] ?]; rewrite mxE.
have whole : example_whole *m example_triangle =
             6%:R *: (example_point + example_tangent) by compute_entries.
by rewrite -scalemxAl whole scalerA mulVf // scale1r.
Qed.

Lemma example_swapped_step :
  (example_point + example_tangent) *m perm_mx example_swap = integer_matrix 5 2
  [:: [:: 0; 1]; [:: 1; 0]; [:: 4; 1]; [:: 2; 1]; [:: 2; 1]].
Proof.
rewrite -[example_swap]invgK -col_permE tpermV; apply/matrixP=> i j; rewrite !mxE.
have [->|->] : j = 0 \/ j = 1.
- by case: j => [[|[|//]] ?]; [left | right]; apply: val_inj.
- by rewrite tpermL; case: i => [[|[|[|[|[|//]]]]] ?].
by rewrite tpermR; case: i => [[|[|[|[|[|//]]]]] ?].
Qed.

Lemma example_is_qr_swapped :
  is_qr ((example_point + example_tangent) *m perm_mx example_swap)
    example_qr_swapped example_triangle_swapped.
Proof.
rewrite example_swapped_step; split.
- by apply: scaled_orthonormal => //; compute_entries.
- by move=> [[|[|//]] ?] [[|[|//]] ?]; rewrite // !mxE mulr0.
- by move=> [[|[|//]] ?]; rewrite !mxE.
set A := integer_matrix 5 2 _.
have whole : example_whole_swapped *m example_whole_triangle =
             (30%:R * 5%:R) *: A by compute_entries.
rewrite -scalemxAl -scalemxAr whole !scalerA.
by rewrite -[LHS]scale1r; congr (_ *: _); apply/eqP; vm_compute.
Qed.

(* Retracting the swapped step by QR is not swapping the retracted step.      *)
Theorem qr_retraction_not_equivariant :
  exists (X u Q Q' : 'M[rat]_(5, 2)) (R R' : 'M[rat]_2) (s : 'S_2),
  [/\ orthonormal_columns X, tangent X u, is_qr (X + u) Q R,
      is_qr (X *m perm_mx s + u *m perm_mx s) Q' R' & Q' <> Q *m perm_mx s].
Proof.
exists example_point, example_tangent, example_qr, example_qr_swapped.
exists example_triangle, example_triangle_swapped, example_swap; split.
- exact: example_point_on_stiefel.
- exact: example_tangent_is_tangent.
- exact: example_is_qr.
- by rewrite -mulmxDl; apply: example_is_qr_swapped.
move=> follows; have swapped := example_is_qr_swapped; rewrite follows in swapped.
have := @qr_follows_only_if _ _ _ _ _ _ _ _ 0 1 example_is_qr swapped.
by rewrite /example_swap tpermL tpermR mxE => /(_ isT).
Qed.

End CounterExample.
