(* The adapter: statistics of rows and columns, a coordinate-wise network     *)
(* with state, and the scaled direction. It sees a matrix only through means, *)
(* so it does not notice padding or duplication and follows permutations.     *)
(*                                                                            *)
(* To cover the presets as they are coded, the adapter reads a family of K    *)
(* matrices of one shape (gradient, momentum): the statistic of a row is the  *)
(* K x K matrix of its mean products, whose diagonal holds the energies. The  *)
(* networks also return E numbers per coordinate that are averaged over the   *)
(* matrix; the averages may enter every scale, every memory and the length:   *)
(* centring (preset paper), mixing and choosing a length (preset base).       *)
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

Variables (F : realFieldType) (K E : nat).
(* Memory per row, per column and per matrix; running means, LSTM states and  *)
(* the number of the step live here.                                          *)
Variables (row_state col_state matrix_state : Type).

(* One network for rows and one for columns. Each sees the statistic of its   *)
(* own coordinate, the mean over the matrix, the memory of the matrix and its *)
(* own; it returns what it found and the numbers to be averaged.              *)
Variables (row_found col_found : Type).
Variable row_network :
  'M[F]_K -> 'M[F]_K -> matrix_state -> row_state -> row_found * 'rV[F]_E.
Variable col_network :
  'M[F]_K -> 'M[F]_K -> matrix_state -> col_state -> col_found * 'rV[F]_E.
(* With the averages over rows and over columns each coordinate then settles  *)
(* its scales, one per matrix of the family, and its next memory.             *)
Variable row_settle :
  'M[F]_K -> matrix_state -> 'rV[F]_E -> 'rV[F]_E -> row_found -> 'rV[F]_K * row_state.
Variable col_settle :
  'M[F]_K -> matrix_state -> 'rV[F]_E -> 'rV[F]_E -> col_found -> 'rV[F]_K * col_state.
(* Once per matrix: the length of the direction and the next memory.          *)
Variable length : 'M[F]_K -> matrix_state -> 'rV[F]_E -> 'rV[F]_E -> F.
Variable remember : 'M[F]_K -> matrix_state -> 'rV[F]_E -> 'rV[F]_E -> matrix_state.
(* The factor that normalises a direction, from its mean square.              *)
Variable normaliser : F -> F.

Section Definitions.

Variables (d p : nat).
(* How to average over rows and over columns: the plain mean, or a masked one.*)
Variables (over_rows : ('I_d -> F) -> F) (over_cols : ('I_p -> F) -> F).
Variable A : 'I_K -> 'M[F]_(d, p).

Definition row_statistic i : 'M[F]_K :=
  \matrix_(a, b) over_cols (fun j => A a i j * A b i j).
Definition col_statistic j : 'M[F]_K :=
  \matrix_(a, b) over_rows (fun i => A a i j * A b i j).
Definition matrix_statistic : 'M[F]_K :=
  \matrix_(a, b) over_rows (fun i => over_cols (fun j => A a i j * A b i j)).

Variables (z : matrix_state) (s : 'I_d -> row_state) (t : 'I_p -> col_state).

Definition row_output i := row_network (row_statistic i) matrix_statistic z (s i).
Definition col_output j := col_network (col_statistic j) matrix_statistic z (t j).
Definition row_pooled : 'rV[F]_E := \row_e over_rows (fun i => (row_output i).2 0 e).
Definition col_pooled : 'rV[F]_E := \row_e over_cols (fun j => (col_output j).2 0 e).

Definition row_settled i :=
  row_settle matrix_statistic z row_pooled col_pooled (row_output i).1.
Definition col_settled j :=
  col_settle matrix_statistic z row_pooled col_pooled (col_output j).1.

Definition scaled : 'M[F]_(d, p) :=
  \matrix_(i, j) \sum_a (row_settled i).1 0 a * A a i j * (col_settled j).1 0 a.

Definition direction : 'M[F]_(d, p) :=
  (length matrix_statistic z row_pooled col_pooled *
   normaliser (over_rows (fun i => over_cols (fun j => scaled i j ^+ 2)))) *: scaled.

Definition next_row_state i := (row_settled i).2.
Definition next_col_state j := (col_settled j).2.
Definition next_matrix_state := remember matrix_statistic z row_pooled col_pooled.

End Definitions.

Section Pullback.

(* The one fact behind all invariances. Along index maps f and g that respect *)
(* the averages, the adapter of the pulled-back family is the pulled-back     *)
(* adapter. Duplication: f forgets the copies. Padding: f embeds the true     *)
(* indices among the masked ones. Permutation: f is a bijection.              *)
Variables (m n m' n' : nat) (f : 'I_m' -> 'I_m) (g : 'I_n' -> 'I_n).
Variables (over_rows : ('I_m -> F) -> F) (over_cols : ('I_n -> F) -> F).
Variables (over_rows' : ('I_m' -> F) -> F) (over_cols' : ('I_n' -> F) -> F).
Hypothesis rows_respected : forall h h', (forall i, h' i = h (f i)) ->
  over_rows' h' = over_rows h.
Hypothesis cols_respected : forall h h', (forall j, h' j = h (g j)) ->
  over_cols' h' = over_cols h.
Variables (A : 'I_K -> 'M[F]_(m, n)) (B : 'I_K -> 'M[F]_(m', n')).
Hypothesis pulled_back : forall a i j, B a i j = A a (f i) (g j).
Variable z : matrix_state.
Variables (s : 'I_m -> row_state) (t : 'I_n -> col_state).
Variables (s' : 'I_m' -> row_state) (t' : 'I_n' -> col_state).
Hypothesis row_states : forall i, s' i = s (f i).
Hypothesis col_states : forall j, t' j = t (g j).

Theorem row_statistic_pullback i :
  row_statistic over_cols' B i = row_statistic over_cols A (f i).
Proof.
apply/matrixP=> a b; rewrite !mxE; apply: cols_respected => j.
by rewrite !pulled_back.
Qed.

Theorem col_statistic_pullback j :
  col_statistic over_rows' B j = col_statistic over_rows A (g j).
Proof.
apply/matrixP=> a b; rewrite !mxE; apply: rows_respected => i.
by rewrite !pulled_back.
Qed.

Theorem matrix_statistic_pullback :
  matrix_statistic over_rows' over_cols' B = matrix_statistic over_rows over_cols A.
Proof.
apply/matrixP=> a b; rewrite !mxE; apply: rows_respected => i.
by apply: cols_respected => j; rewrite !pulled_back.
Qed.

Lemma row_output_pullback i :
  row_output over_rows' over_cols' B z s' i = row_output over_rows over_cols A z s (f i).
Proof.
by rewrite /row_output row_statistic_pullback matrix_statistic_pullback row_states.
Qed.

Lemma col_output_pullback j :
  col_output over_rows' over_cols' B z t' j = col_output over_rows over_cols A z t (g j).
Proof.
by rewrite /col_output col_statistic_pullback matrix_statistic_pullback col_states.
Qed.

Lemma row_pooled_pullback :
  row_pooled over_rows' over_cols' B z s' = row_pooled over_rows over_cols A z s.
Proof.
apply/rowP=> e; rewrite !mxE; apply: rows_respected => i.
by rewrite row_output_pullback.
Qed.

Lemma col_pooled_pullback :
  col_pooled over_rows' over_cols' B z t' = col_pooled over_rows over_cols A z t.
Proof.
apply/rowP=> e; rewrite !mxE; apply: cols_respected => j.
by rewrite col_output_pullback.
Qed.

Lemma row_settled_pullback i :
  row_settled over_rows' over_cols' B z s' t' i =
  row_settled over_rows over_cols A z s t (f i).
Proof.
by rewrite /row_settled matrix_statistic_pullback row_pooled_pullback
  col_pooled_pullback row_output_pullback.
Qed.

Lemma col_settled_pullback j :
  col_settled over_rows' over_cols' B z s' t' j =
  col_settled over_rows over_cols A z s t (g j).
Proof.
by rewrite /col_settled matrix_statistic_pullback row_pooled_pullback
  col_pooled_pullback col_output_pullback.
Qed.

Lemma scaled_pullback i j :
  scaled over_rows' over_cols' B z s' t' i j =
  scaled over_rows over_cols A z s t (f i) (g j).
Proof.
rewrite !mxE; apply: eq_bigr => a _.
by rewrite row_settled_pullback col_settled_pullback pulled_back.
Qed.

Theorem adapter_pullback i j :
  direction over_rows' over_cols' B z s' t' i j =
  direction over_rows over_cols A z s t (f i) (g j).
Proof.
rewrite /direction [LHS]mxE [RHS]mxE scaled_pullback.
rewrite matrix_statistic_pullback row_pooled_pullback col_pooled_pullback.
congr (_ * normaliser _ * _); apply: rows_respected => i'.
by apply: cols_respected => j'; rewrite scaled_pullback.
Qed.

Theorem row_state_pullback i :
  next_row_state over_rows' over_cols' B z s' t' i =
  next_row_state over_rows over_cols A z s t (f i).
Proof. by rewrite /next_row_state row_settled_pullback. Qed.

Theorem col_state_pullback j :
  next_col_state over_rows' over_cols' B z s' t' j =
  next_col_state over_rows over_cols A z s t (g j).
Proof. by rewrite /next_col_state col_settled_pullback. Qed.

Theorem matrix_state_pullback :
  next_matrix_state over_rows' over_cols' B z s' t' =
  next_matrix_state over_rows over_cols A z s t.
Proof.
by rewrite /next_matrix_state matrix_statistic_pullback row_pooled_pullback
  col_pooled_pullback.
Qed.

End Pullback.

Section Instances.

Variables (d p : nat) (A : 'I_K -> 'M[F]_(d, p)) (z : matrix_state).
Variables (s : 'I_d -> row_state) (t : 'I_p -> col_state).

Local Notation plain := (direction (@mean F d) (@mean F p) A z s t).

Theorem adapter_duplicated (D P m n : nat) (f : 'I_D -> 'I_d) (g : 'I_P -> 'I_p)
    (B : 'I_K -> 'M[F]_(D, P)) s' t' :
  evenly m f -> evenly n g -> (forall a i j, B a i j = A a (f i) (g j)) ->
  (forall i, s' i = s (f i)) -> (forall j, t' j = t (g j)) ->
  forall i j, direction (@mean F D) (@mean F P) B z s' t' i j = plain (f i) (g j).
Proof.
move=> even_f even_g duplicated row_states col_states.
apply: adapter_pullback => // h h' eq_h.
  by rewrite (eq_mean eq_h) (mean_duplicated _ even_f).
by rewrite (eq_mean eq_h) (mean_duplicated _ even_g).
Qed.

(* Nothing is asked of B outside the mask: it need not even be zero there.    *)
Theorem adapter_padded (D P : nat) (f : 'I_d -> 'I_D) (g : 'I_p -> 'I_P)
    (rows : pred 'I_D) (cols : pred 'I_P) (B : 'I_K -> 'M[F]_(D, P)) s' t' :
  injective f -> injective g ->
  rows =1 (mem (codom f)) -> cols =1 (mem (codom g)) ->
  (forall a i j, B a (f i) (g j) = A a i j) ->
  (forall i, s' (f i) = s i) -> (forall j, t' (g j) = t j) ->
  forall i j,
  direction (masked_mean rows) (masked_mean cols) B z s' t' (f i) (g j) = plain i j.
Proof.
move=> injective_f injective_g rows_f cols_g padded row_states col_states i j.
symmetry; apply: adapter_pullback => // h h' eq_h.
  by rewrite (mean_padded _ injective_f rows_f) (eq_mean eq_h).
by rewrite (mean_padded _ injective_g cols_g) (eq_mean eq_h).
Qed.

(* Zero entries stay zero: padding stays padding.                             *)
Theorem adapter_keeps_zero over_rows over_cols i j :
  (forall a, A a i j = 0) -> direction over_rows over_cols A z s t i j = 0.
Proof.
move=> zero; rewrite /direction mxE [scaled _ _ _ _ _ _ _ _]mxE big1 ?mulr0 //.
by move=> a _; rewrite zero mulr0 mul0r.
Qed.

Section Permutation.

Variables (sigma : 'S_d) (tau : 'S_p).

Definition permute (M : 'M[F]_(d, p)) := perm_mx sigma *m M *m perm_mx tau.

Lemma permuteE (M : 'M[F]_(d, p)) i j : permute M i j = M (sigma i) (tau^-1%g j).
Proof. by rewrite /permute -{1}[tau]invgK -col_permE -row_permE !mxE. Qed.

Lemma mean_permuted n (s0 : 'S_n) (h h' : 'I_n -> F) :
  (forall i, h' i = h (s0 i)) -> mean h' = mean h.
Proof. by move=> eq_h; rewrite (eq_mean eq_h) (mean_duplicated _ (perm_evenly s0)). Qed.

Variables (B : 'I_K -> 'M[F]_(d, p)).
Variables (s' : 'I_d -> row_state) (t' : 'I_p -> col_state).
Hypothesis permuted : forall a, B a = permute (A a).
Hypothesis row_states : forall i, s' i = s (sigma i).
Hypothesis col_states : forall j, t' j = t (tau^-1%g j).

Lemma permuted_entries a i j : B a i j = A a (sigma i) (tau^-1%g j).
Proof. by rewrite permuted permuteE. Qed.

Theorem adapter_equivariant :
  direction (@mean F d) (@mean F p) B z s' t' = permute plain.
Proof.
apply/matrixP=> i j; rewrite permuteE.
apply: adapter_pullback row_states col_states _ _; last exact: permuted_entries.
  exact: mean_permuted.
exact: mean_permuted.
Qed.

Theorem adapter_state_equivariant :
  [/\ forall i, next_row_state (@mean F d) (@mean F p) B z s' t' i =
                next_row_state (@mean F d) (@mean F p) A z s t (sigma i),
      forall j, next_col_state (@mean F d) (@mean F p) B z s' t' j =
                next_col_state (@mean F d) (@mean F p) A z s t (tau^-1%g j) &
      next_matrix_state (@mean F d) (@mean F p) B z s' t' =
      next_matrix_state (@mean F d) (@mean F p) A z s t].
Proof.
have rows_ok := @mean_permuted d sigma; have cols_ok := @mean_permuted p tau^-1%g.
split=> [i|j|].
- exact: (row_state_pullback rows_ok cols_ok permuted_entries).
- exact: (col_state_pullback rows_ok cols_ok permuted_entries).
exact: (matrix_state_pullback rows_ok cols_ok permuted_entries).
Qed.

End Permutation.

End Instances.

End Adapter.

Section OneMatrix.

Variables (F : realFieldType) (row_state col_state : Type) (d p : nat).
Variable row_network : 'M[F]_1 -> 'M[F]_1 -> row_state -> 'rV[F]_1 * row_state.
Variable col_network : 'M[F]_1 -> 'M[F]_1 -> col_state -> 'rV[F]_1 * col_state.

(* Without momentum, averaged outputs and normalisation this is the           *)
(* D = diag(l) R diag(k) of the method, with l and k computed from            *)
(* diag(R R^T)/p and diag(R^T R)/d.                                           *)
Theorem adapter_is_diagonal_scaling (R : 'M[F]_(d, p)) s t :
  let r i := row_statistic (@mean F p) (fun=> R) i in
  let c j := col_statistic (@mean F d) (fun=> R) j in
  let m := matrix_statistic (@mean F d) (@mean F p) (fun=> R) in
  direction (fun r m _ s => (row_network r m s, 0 : 'rV[F]_0))
    (fun c m _ t => (col_network c m t, 0 : 'rV[F]_0))
    (fun _ _ _ _ found => found) (fun _ _ _ _ found => found)
    (fun _ _ _ _ => 1) (fun=> 1) (@mean F d) (@mean F p) (fun=> R) tt s t =
    diag_mx (\row_i (row_network (r i) m (s i)).1 0 0) *m R *m
    diag_mx (\row_j (col_network (c j) m (t j)).1 0 0).
Proof.
rewrite /direction mulr1 scale1r; apply/matrixP=> i j.
by rewrite mul_diag_mx mul_mx_diag !mxE big_ord1.
Qed.

Theorem row_statistic_diagonal (R : 'M[F]_(d, p)) i :
  row_statistic (@mean F p) (fun _ : 'I_1 => R) i 0 0 = (R *m R^T) i i / p%:R.
Proof.
by rewrite /row_statistic mxE /mean !mxE; congr (_ / _); apply: eq_bigr => j _; rewrite mxE.
Qed.

Theorem col_statistic_diagonal (R : 'M[F]_(d, p)) j :
  col_statistic (@mean F d) (fun _ : 'I_1 => R) j 0 0 = (R^T *m R) j j / d%:R.
Proof.
by rewrite /col_statistic mxE /mean !mxE; congr (_ / _); apply: eq_bigr => i _; rewrite mxE.
Qed.

End OneMatrix.
