(* The whole update: gradient, momentum, adapter, projection, retraction and  *)
(* transport by projection. It follows permutations of rows and columns for   *)
(* every retraction that does, over whole trajectories and not only one step. *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices stiefel adapter cayley cholesky_qr spd polar.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section Update.

Variables (F : realFieldType) (d p E : nat).
Variables (row_state col_state matrix_state row_found col_found : Type).
Variable row_network :
  'M[F]_2 -> 'M[F]_2 -> matrix_state -> row_state -> row_found * 'rV[F]_E.
Variable col_network :
  'M[F]_2 -> 'M[F]_2 -> matrix_state -> col_state -> col_found * 'rV[F]_E.
Variable row_settle :
  'M[F]_2 -> matrix_state -> 'rV[F]_E -> 'rV[F]_E -> row_found -> 'rV[F]_2 * row_state.
Variable col_settle :
  'M[F]_2 -> matrix_state -> 'rV[F]_E -> 'rV[F]_E -> col_found -> 'rV[F]_2 * col_state.
Variable length : 'M[F]_2 -> matrix_state -> 'rV[F]_E -> 'rV[F]_E -> F.
Variable remember : 'M[F]_2 -> matrix_state -> 'rV[F]_E -> 'rV[F]_E -> matrix_state.
Variable normaliser : F -> F.
(* The weight of the old momentum; it may change with the step, which lives   *)
(* in the memory of the matrix.                                               *)
Variable decay : matrix_state -> F.
Variable retract : 'M[F]_(d, p) -> 'M[F]_(d, p) -> 'M[F]_(d, p).

(* What travels from step to step. Averages over time of the statistics live  *)
(* in the coordinate states: they are functions of the coordinate's own       *)
(* history.                                                                   *)
Record carry := Carry {
  point : 'M[F]_(d, p);
  momentum : 'M[F]_(d, p);
  memory : matrix_state;
  rows : 'I_d -> row_state;
  cols : 'I_p -> col_state }.

Definition step (gradient : 'M[F]_(d, p) -> 'M[F]_(d, p)) (x : carry) : carry :=
  let R := project (point x) (gradient (point x)) in
  let z := memory x in
  let m := decay z *: momentum x + (1 - decay z) *: R in
  let family := fun a : 'I_2 => if a == 0 then R else m in
  let D := direction row_network col_network row_settle col_settle length normaliser
             (@mean F d) (@mean F p) family z (rows x) (cols x) in
  let Y := retract (point x) (- project (point x) D) in
  Carry Y (project Y m)
    (next_matrix_state row_network col_network remember
       (@mean F d) (@mean F p) family z (rows x) (cols x))
    (next_row_state row_network col_network row_settle
       (@mean F d) (@mean F p) family z (rows x) (cols x))
    (next_col_state row_network col_network col_settle
       (@mean F d) (@mean F p) family z (rows x) (cols x)).

(* Gradients may change from step to step (mini-batches).                     *)
Fixpoint trajectory (gradients : nat -> 'M[F]_(d, p) -> 'M[F]_(d, p))
    (n : nat) (x : carry) : carry :=
  if n is n'.+1 then step (gradients n') (trajectory gradients n' x) else x.

Hypothesis retract_on_stiefel : forall X u,
  orthonormal_columns X -> tangent X u -> orthonormal_columns (retract X u).

Lemma tangent_step X D :
  orthonormal_columns X -> tangent X (- project X D : 'M[F]_(d, p)).
Proof.
move=> oX; have := project_tangent D oX; rewrite /tangent /is_skew mulmxN trmxN.
by move=> ->.
Qed.

Theorem step_on_stiefel gradient x :
  orthonormal_columns (point x) -> orthonormal_columns (point (step gradient x)).
Proof. by move=> oX; apply: retract_on_stiefel => //; apply: tangent_step. Qed.

Theorem trajectory_on_stiefel gradients n x :
  orthonormal_columns (point x) ->
  orthonormal_columns (point (trajectory gradients n x)).
Proof. by move=> oX; elim: n => //= n IH; apply: step_on_stiefel. Qed.

Section Permutations.

Variables (sigma : 'S_d) (tau : 'S_p).
Local Notation permute := (@permute F d p sigma tau).

Hypothesis retract_permutes : forall X u,
  orthonormal_columns X -> tangent X u ->
  retract (permute X) (permute u) = permute (retract X u).

Definition related (x y : carry) : Prop :=
  [/\ point y = permute (point x), momentum y = permute (momentum x),
      memory y = memory x, forall i, rows y i = rows x (sigma i) &
      forall j, cols y j = cols x (tau^-1%g j)].

Lemma project_permutes X V : project (permute X) (permute V) = permute (project X V).
Proof. by apply: project_equivariant; apply: perm_orthogonal. Qed.

Lemma permute_combination a b X V :
  a *: permute X + b *: permute V = permute (a *: X + b *: V).
Proof. by rewrite /adapter.permute mulmxDr mulmxDl -!scalemxAr -!scalemxAl. Qed.

Lemma permuteN X : - permute X = permute (- X).
Proof. by rewrite /adapter.permute mulmxN mulNmx. Qed.

Theorem step_equivariant gradient gradient' x y :
  (forall X, gradient' (permute X) = permute (gradient X)) ->
  orthonormal_columns (point x) -> related x y ->
  related (step gradient x) (step gradient' y).
Proof.
case: x => X m z s t; case: y => X' m' z' s' t' gradients /= oX.
case=> /= -> -> -> row_states col_states {X' m' z'}.
rewrite /step /= gradients project_permutes permute_combination.
set R := project X (gradient X); set m1 := decay z *: m + _ *: R.
set A := fun a : 'I_2 => if a == 0 then R else m1.
set B := fun a : 'I_2 => if a == 0 then permute R else permute m1.
have family a : B a = permute (A a) by rewrite /A /B; case: (a == 0).
have [next_rows next_cols next_memory] := adapter_state_equivariant
  row_network col_network row_settle col_settle remember z family row_states col_states.
have directions := adapter_equivariant row_network col_network row_settle col_settle length
  normaliser z family row_states col_states.
rewrite directions project_permutes permuteN retract_permutes //; last first.
  exact: tangent_step.
split=> //=; exact: project_permutes.
Qed.

Theorem trajectory_equivariant gradients gradients' n x y :
  (forall k X, gradients' k (permute X) = permute (gradients k X)) ->
  orthonormal_columns (point x) -> related x y ->
  related (trajectory gradients n x) (trajectory gradients' n y).
Proof.
move=> permuted oX xy; elim: n => //= n IH.
by apply: step_equivariant => //; apply: trajectory_on_stiefel.
Qed.

End Permutations.

End Update.

Section Instances.

Variables (F : realFieldType) (d p : nat).
Variables (sigma : 'S_d) (tau : 'S_p).

(* Both hypotheses of the update hold for Cayley ...                          *)
Theorem cayley_qualifies :
  (forall X u : 'M[F]_(d, p), orthonormal_columns X -> tangent X u ->
     orthonormal_columns (cayley_retract X u)) /\
  (forall X u : 'M[F]_(d, p), orthonormal_columns X -> tangent X u ->
     cayley_retract (permute sigma tau X) (permute sigma tau u) =
     permute sigma tau (cayley_retract X u)).
Proof.
split=> X u oX _; first exact: cayley_retract_on_stiefel.
by apply: cayley_retract_equivariant; apply: perm_orthogonal.
Qed.

(* ... and for every function that computes polar factors.                    *)
Theorem polar_qualifies (retract : 'M[F]_(d, p) -> 'M[F]_(d, p) -> 'M[F]_(d, p)) :
  (forall X u, orthonormal_columns X -> tangent X u ->
     is_polar (X + u) (retract X u)) ->
  (forall X u, orthonormal_columns X -> tangent X u ->
     orthonormal_columns (retract X u)) /\
  (forall X u, orthonormal_columns X -> tangent X u ->
     retract (permute sigma tau X) (permute sigma tau u) =
     permute sigma tau (retract X u)).
Proof.
move=> polar_retract; split=> X u oX tu; first by have [] := polar_retract X u oX tu.
by apply: polar_retract_equivariant => //; apply: perm_orthogonal.
Qed.

End Instances.
