(* The adapter: statistics of rows and columns, a coordinate-wise network     *)
(* with state, and the scaled direction. It sees a matrix only through means, *)
(* so it does not notice padding or duplication and follows permutations.     *)
(*                                                                            *)
(* To cover the presets with momentum, the adapter reads a family of K        *)
(* matrices of one shape (gradient, momentum, ...): the statistic of a row is *)
(* the K x K matrix of its mean products, whose diagonal holds the energies.  *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section Means.

Variable F : realFieldType.

Definition mean n (h : 'I_n -> F) : F := (\sum_i h i) / n%:R.

Definition masked_mean n (mask : pred 'I_n) (h : 'I_n -> F) : F :=
  (\sum_(i | mask i) h i) / #|mask|%:R.

(* f takes every value equally often: the index map of a duplication, and,    *)
(* with k = 1, of a permutation.                                              *)
Definition evenly n m (k : nat) (f : 'I_n -> 'I_m) : Prop :=
  (0 < k)%N /\ forall i, #|[pred i' | f i' == i]| = k.

Lemma perm_evenly n (s : 'S_n) : evenly 1 s.
Proof.
split=> // i; rewrite -(card1 (s^-1%g i)); apply: eq_card => j.
by rewrite !inE -[j == _](inj_eq (@perm_inj _ s)) permKV.
Qed.

Lemma eq_mean n (h h' : 'I_n -> F) : h =1 h' -> mean h = mean h'.
Proof. by move=> eq_h; congr (_ / _); apply: eq_bigr. Qed.

Lemma eq_masked_mean n (mask : pred 'I_n) (h h' : 'I_n -> F) :
  h =1 h' -> masked_mean mask h = masked_mean mask h'.
Proof. by move=> eq_h; congr (_ / _); apply: eq_bigr. Qed.

Lemma sum_evenly n m k (f : 'I_n -> 'I_m) (h : 'I_m -> F) :
  evenly k f -> \sum_i' h (f i') = k%:R * \sum_i h i.
Proof.
case=> _ fibres; rewrite (partition_big f xpredT) //= mulr_sumr.
apply: eq_bigr => i _; rewrite (eq_bigr (fun=> h i)) => [|i' /eqP -> //].
by rewrite sumr_const fibres mulr_natl.
Qed.

Theorem mean_duplicated n m k (f : 'I_n -> 'I_m) (h : 'I_m -> F) :
  evenly k f -> mean (fun i' => h (f i')) = mean h.
Proof.
move=> even_f; have := sum_evenly (fun=> 1) even_f.
rewrite !sumr_const !card_ord => count.
have k_neq0 : k%:R != 0 :> F by case: even_f => k_gt0 _; rewrite pnatr_eq0 -lt0n.
by rewrite /mean (sum_evenly h even_f) count invfM mulrACA mulfV // mul1r.
Qed.

Theorem mean_padded n N (f : 'I_n -> 'I_N) (mask : pred 'I_N) (h : 'I_N -> F) :
  injective f -> mask =1 (mem (codom f)) ->
  masked_mean mask h = mean (fun i => h (f i)).
Proof.
move=> injective_f mask_f; rewrite /masked_mean /mean.
have -> : #|mask| = n by rewrite (eq_card mask_f) card_codom // card_ord.
congr (_ / _); rewrite (eq_bigl _ _ mask_f) /= -big_uniq /=; last first.
  by rewrite map_inj_uniq // enum_uniq.
by rewrite big_map big_enum.
Qed.

(* With zeros outside the mask the plain sum may stand for the masked one, as *)
(* long as the count is the masked count.                                     *)
Theorem masked_mean_zero_padding n (mask : pred 'I_n) (h : 'I_n -> F) :
  (forall i, ~~ mask i -> h i = 0) ->
  masked_mean mask h = (\sum_i h i) / #|mask|%:R.
Proof.
move=> zero; rewrite /masked_mean [in RHS](bigID mask) /=.
by rewrite [X in _ + X]big1 ?addr0.
Qed.

End Means.

Section Adapter.

Variables (F : realFieldType) (K : nat) (row_state col_state : Type).

(* One network for rows and one for columns. Each sees the statistic of its   *)
(* own coordinate, the mean over the matrix, and the state of its coordinate; *)
(* it returns one scale per matrix of the family, and the next state.         *)
Variable row_network : 'M[F]_K -> 'M[F]_K -> row_state -> 'rV[F]_K * row_state.
Variable col_network : 'M[F]_K -> 'M[F]_K -> col_state -> 'rV[F]_K * col_state.
(* The factor that normalises a direction, from its mean energy.              *)
Variable normaliser : F -> F.

Section Statistics.

Variables (d p : nat).
Implicit Types (A : 'I_K -> 'M[F]_(d, p)) (rows : pred 'I_d) (cols : pred 'I_p).

Definition row_statistic A i : 'M[F]_K :=
  \matrix_(a, b) mean (fun j => A a i j * A b i j).
Definition col_statistic A j : 'M[F]_K :=
  \matrix_(a, b) mean (fun i => A a i j * A b i j).
Definition matrix_statistic A : 'M[F]_K :=
  \matrix_(a, b) mean (fun i => mean (fun j => A a i j * A b i j)).

Definition masked_row_statistic cols A i : 'M[F]_K :=
  \matrix_(a, b) masked_mean cols (fun j => A a i j * A b i j).
Definition masked_col_statistic rows A j : 'M[F]_K :=
  \matrix_(a, b) masked_mean rows (fun i => A a i j * A b i j).
Definition masked_matrix_statistic rows cols A : 'M[F]_K :=
  \matrix_(a, b) masked_mean rows (fun i =>
                   masked_mean cols (fun j => A a i j * A b i j)).

Definition scaled A (l : 'I_d -> 'rV[F]_K) (k : 'I_p -> 'rV[F]_K) : 'M[F]_(d, p) :=
  \matrix_(i, j) \sum_a l i 0 a * A a i j * k j 0 a.

Definition direction A (s : 'I_d -> row_state) (t : 'I_p -> col_state) :=
  let D := scaled A
    (fun i => (row_network (row_statistic A i) (matrix_statistic A) (s i)).1)
    (fun j => (col_network (col_statistic A j) (matrix_statistic A) (t j)).1) in
  normaliser (mean (fun i => mean (fun j => D i j ^+ 2))) *: D.

Definition next_row_state A (s : 'I_d -> row_state) i :=
  (row_network (row_statistic A i) (matrix_statistic A) (s i)).2.
Definition next_col_state A (t : 'I_p -> col_state) j :=
  (col_network (col_statistic A j) (matrix_statistic A) (t j)).2.

Definition masked_direction rows cols A s t :=
  let D := scaled A
    (fun i => (row_network (masked_row_statistic cols A i)
                 (masked_matrix_statistic rows cols A) (s i)).1)
    (fun j => (col_network (masked_col_statistic rows A j)
                 (masked_matrix_statistic rows cols A) (t j)).1) in
  normaliser (masked_mean rows (fun i => masked_mean cols (fun j => D i j ^+ 2)))
    *: D.

Definition masked_next_row_state rows cols A (s : 'I_d -> row_state) i :=
  (row_network (masked_row_statistic cols A i)
     (masked_matrix_statistic rows cols A) (s i)).2.
Definition masked_next_col_state rows cols A (t : 'I_p -> col_state) j :=
  (col_network (masked_col_statistic rows A j)
     (masked_matrix_statistic rows cols A) (t j)).2.

End Statistics.

Section Duplication.

Variables (d p D P m n : nat) (f : 'I_D -> 'I_d) (g : 'I_P -> 'I_p).
Hypotheses (even_f : evenly m f) (even_g : evenly n g).
Variables (A : 'I_K -> 'M[F]_(d, p)) (B : 'I_K -> 'M[F]_(D, P)).
Hypothesis duplicated : forall a i j, B a i j = A a (f i) (g j).
Variables (s : 'I_d -> row_state) (t : 'I_p -> col_state).
Variables (s' : 'I_D -> row_state) (t' : 'I_P -> col_state).
Hypotheses (row_states : forall i, s' i = s (f i)).
Hypotheses (col_states : forall j, t' j = t (g j)).

Theorem row_statistic_duplicated i : row_statistic B i = row_statistic A (f i).
Proof.
apply/matrixP=> a b; rewrite !mxE -(mean_duplicated _ even_g).
by apply: eq_mean => j; rewrite !duplicated.
Qed.

Theorem col_statistic_duplicated j : col_statistic B j = col_statistic A (g j).
Proof.
apply/matrixP=> a b; rewrite !mxE -(mean_duplicated _ even_f).
by apply: eq_mean => i; rewrite !duplicated.
Qed.

Theorem matrix_statistic_duplicated : matrix_statistic B = matrix_statistic A.
Proof.
apply/matrixP=> a b; rewrite !mxE -(mean_duplicated _ even_f).
apply: eq_mean => i; rewrite -(mean_duplicated _ even_g).
by apply: eq_mean => j; rewrite !duplicated.
Qed.

Theorem adapter_duplicated i j : direction B s' t' i j = direction A s t (f i) (g j).
Proof.
rewrite /direction matrix_statistic_duplicated [LHS]mxE [RHS]mxE.
set DA := scaled A _ _; set DB := scaled B _ _.
have entry i' j' : DB i' j' = DA (f i') (g j').
  rewrite !mxE; apply: eq_bigr => a _.
  by rewrite row_statistic_duplicated col_statistic_duplicated duplicated
    row_states col_states.
rewrite entry; congr (normaliser _ * _).
rewrite -[RHS](mean_duplicated _ even_f); apply: eq_mean => i'.
by rewrite -[RHS](mean_duplicated _ even_g); apply: eq_mean => j'; rewrite entry.
Qed.

Theorem row_state_duplicated i : next_row_state B s' i = next_row_state A s (f i).
Proof.
by rewrite /next_row_state matrix_statistic_duplicated row_statistic_duplicated
  row_states.
Qed.

Theorem col_state_duplicated j : next_col_state B t' j = next_col_state A t (g j).
Proof.
by rewrite /next_col_state matrix_statistic_duplicated col_statistic_duplicated
  col_states.
Qed.

End Duplication.

Section Padding.

Variables (d p D P : nat) (f : 'I_d -> 'I_D) (g : 'I_p -> 'I_P).
Variables (rows : pred 'I_D) (cols : pred 'I_P).
Hypotheses (injective_f : injective f) (injective_g : injective g).
Hypotheses (rows_f : rows =1 (mem (codom f))) (cols_g : cols =1 (mem (codom g))).
Variables (A : 'I_K -> 'M[F]_(d, p)) (B : 'I_K -> 'M[F]_(D, P)).
(* Nothing is asked of B outside the mask: it need not even be zero there.    *)
Hypothesis padded : forall a i j, B a (f i) (g j) = A a i j.
Variables (s : 'I_d -> row_state) (t : 'I_p -> col_state).
Variables (s' : 'I_D -> row_state) (t' : 'I_P -> col_state).
Hypotheses (row_states : forall i, s' (f i) = s i).
Hypotheses (col_states : forall j, t' (g j) = t j).

Theorem row_statistic_padded i :
  masked_row_statistic cols B (f i) = row_statistic A i.
Proof.
apply/matrixP=> a b; rewrite !mxE (mean_padded _ injective_g cols_g).
by apply: eq_mean => j; rewrite !padded.
Qed.

Theorem col_statistic_padded j :
  masked_col_statistic rows B (g j) = col_statistic A j.
Proof.
apply/matrixP=> a b; rewrite !mxE (mean_padded _ injective_f rows_f).
by apply: eq_mean => i; rewrite !padded.
Qed.

Theorem matrix_statistic_padded :
  masked_matrix_statistic rows cols B = matrix_statistic A.
Proof.
apply/matrixP=> a b; rewrite !mxE (mean_padded _ injective_f rows_f).
apply: eq_mean => i; rewrite (mean_padded _ injective_g cols_g).
by apply: eq_mean => j; rewrite !padded.
Qed.

Theorem adapter_padded i j :
  masked_direction rows cols B s' t' (f i) (g j) = direction A s t i j.
Proof.
rewrite /masked_direction /direction matrix_statistic_padded [LHS]mxE [RHS]mxE.
set DA := scaled A _ _; set DB := scaled B _ _.
have entry i' j' : DB (f i') (g j') = DA i' j'.
  rewrite !mxE; apply: eq_bigr => a _.
  by rewrite row_statistic_padded col_statistic_padded padded row_states col_states.
rewrite entry; congr (normaliser _ * _).
rewrite (mean_padded _ injective_f rows_f); apply: eq_mean => i'.
by rewrite (mean_padded _ injective_g cols_g); apply: eq_mean => j'; rewrite entry.
Qed.

Theorem row_state_padded i :
  masked_next_row_state rows cols B s' (f i) = next_row_state A s i.
Proof.
by rewrite /masked_next_row_state matrix_statistic_padded row_statistic_padded
  row_states.
Qed.

Theorem col_state_padded j :
  masked_next_col_state rows cols B t' (g j) = next_col_state A t j.
Proof.
by rewrite /masked_next_col_state matrix_statistic_padded col_statistic_padded
  col_states.
Qed.

(* Zero entries stay zero: padding stays padding.                             *)
Theorem adapter_keeps_zero i j :
  (forall a, B a i j = 0) -> masked_direction rows cols B s' t' i j = 0.
Proof.
move=> zero; rewrite /masked_direction mxE [scaled _ _ _ _ _]mxE big1 ?mulr0 //.
by move=> a _; rewrite zero mulr0 mul0r.
Qed.

End Padding.

Section Permutation.

Variables (d p : nat) (sigma : 'S_d) (tau : 'S_p).
Implicit Types (A B : 'I_K -> 'M[F]_(d, p)).
Implicit Types (s : 'I_d -> row_state) (t : 'I_p -> col_state).

Definition permute (A : 'M[F]_(d, p)) := perm_mx sigma *m A *m perm_mx tau.

Lemma permuteE (A : 'M[F]_(d, p)) i j : permute A i j = A (sigma i) (tau^-1%g j).
Proof. by rewrite /permute -{1}[tau]invgK -col_permE -row_permE !mxE. Qed.

Theorem adapter_equivariant A B s t s' t' :
  (forall a, B a = permute (A a)) ->
  (forall i, s' i = s (sigma i)) -> (forall j, t' j = t (tau^-1%g j)) ->
  direction B s' t' = permute (direction A s t).
Proof.
move=> permuted row_states col_states; apply/matrixP=> i j; rewrite permuteE.
apply: (adapter_duplicated (perm_evenly sigma) (perm_evenly tau^-1)) => //.
by move=> a i' j'; rewrite permuted permuteE.
Qed.

Theorem adapter_state_equivariant A B s t s' t' :
  (forall a, B a = permute (A a)) ->
  (forall i, s' i = s (sigma i)) -> (forall j, t' j = t (tau^-1%g j)) ->
  (forall i, next_row_state B s' i = next_row_state A s (sigma i)) /\
  (forall j, next_col_state B t' j = next_col_state A t (tau^-1%g j)).
Proof.
move=> permuted row_states col_states.
have entries a i' j' : B a i' j' = A a (sigma i') (tau^-1%g j').
  by rewrite permuted permuteE.
split=> [i|j].
  exact: (row_state_duplicated (perm_evenly sigma) (perm_evenly tau^-1) entries).
exact: (col_state_duplicated (perm_evenly sigma) (perm_evenly tau^-1) entries).
Qed.

End Permutation.

End Adapter.

Section OneMatrix.

Variables (F : realFieldType) (row_state col_state : Type) (d p : nat).
Variable row_network : 'M[F]_1 -> 'M[F]_1 -> row_state -> 'rV[F]_1 * row_state.
Variable col_network : 'M[F]_1 -> 'M[F]_1 -> col_state -> 'rV[F]_1 * col_state.

(* Without momentum and without normalisation this is D = diag(l) R diag(k),  *)
(* with l and k computed from diag(R R^T)/p and diag(R^T R)/d.                *)
Theorem adapter_is_diagonal_scaling (R : 'M[F]_(d, p)) s t :
  let r i := row_statistic (fun=> R) i in
  let c j := col_statistic (fun=> R) j in
  let m := matrix_statistic (fun=> R) in
  direction row_network col_network (fun=> 1) (fun=> R) s t =
    diag_mx (\row_i (row_network (r i) m (s i)).1 0 0) *m R *m
    diag_mx (\row_j (col_network (c j) m (t j)).1 0 0).
Proof.
rewrite /direction scale1r; apply/matrixP=> i j.
by rewrite mul_diag_mx mul_mx_diag !mxE big_ord1.
Qed.

Theorem row_statistic_diagonal (R : 'M[F]_(d, p)) i :
  row_statistic (fun _ : 'I_1 => R) i 0 0 = (R *m R^T) i i / p%:R.
Proof.
by rewrite /row_statistic mxE /mean !mxE; congr (_ / _); apply: eq_bigr => j _; rewrite mxE.
Qed.

Theorem col_statistic_diagonal (R : 'M[F]_(d, p)) j :
  col_statistic (fun _ : 'I_1 => R) j 0 0 = (R^T *m R) j j / d%:R.
Proof.
by rewrite /col_statistic mxE /mean !mxE; congr (_ / _); apply: eq_bigr => i _; rewrite mxE.
Qed.

End OneMatrix.
