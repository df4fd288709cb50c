(* Descent: in coordinates where the metric is Euclidean, positive row and    *)
(* column scales followed by the projection give a descent direction, with    *)
(* explicit constants, hence a sufficient decrease per step. In the ambient   *)
(* coordinates of the canonical metric the same scales can ascend.            *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices stiefel rational.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory Order.TotalTheory.
Local Open Scope ring_scope.

Section Scaling.

Variables (F : realFieldType) (d p : nat).
Variables (l : 'I_d -> F) (k : 'I_p -> F) (l_low l_high k_low k_high : F).
Hypotheses (l_low_gt0 : 0 < l_low) (k_low_gt0 : 0 < k_low).
Hypothesis l_bounded : forall i, l_low <= l i <= l_high.
Hypothesis k_bounded : forall j, k_low <= k j <= k_high.
Implicit Types X R V : 'M[F]_(d, p).

Definition scale_both R : 'M[F]_(d, p) := \matrix_(i, j) (l i * R i j * k j).

Lemma scale_bounds i j : l_low * k_low <= l i * k j <= l_high * k_high.
Proof.
have /andP[l_ge l_le] := l_bounded i; have /andP[k_ge k_le] := k_bounded j.
have l_pos := lt_le_trans l_low_gt0 l_ge; have k_pos := lt_le_trans k_low_gt0 k_ge.
by apply/andP; split; apply: ler_pmul => //; apply: ltW.
Qed.

Theorem scaled_inner_lower R :
  l_low * k_low * inner R R <= inner R (scale_both R).
Proof.
rewrite !inner_sum mulr_sumr; apply: ler_sum => i _.
rewrite mulr_sumr; apply: ler_sum => j _; rewrite mxE.
have -> : R i j * (l i * R i j * k j) = l i * k j * (R i j * R i j) by ring.
have /andP[lower _] := scale_bounds i j.
by apply: ler_wpmul2r => //; rewrite -expr2 sqr_ge0.
Qed.

Theorem scaled_norm_upper R :
  inner (scale_both R) (scale_both R) <= (l_high * k_high) ^+ 2 * inner R R.
Proof.
rewrite !inner_sum mulr_sumr; apply: ler_sum => i _.
rewrite mulr_sumr; apply: ler_sum => j _; rewrite mxE.
have -> : l i * R i j * k j * (l i * R i j * k j) =
          (l i * k j) ^+ 2 * (R i j * R i j) by ring.
have /andP[lower upper] := scale_bounds i j.
apply: ler_wpmul2r; first by rewrite -expr2 sqr_ge0.
have positive : 0 <= l i * k j by apply: le_trans lower; rewrite mulr_ge0 ?ltW.
by rewrite ler_sqr ?nnegrE // (le_trans positive).
Qed.

(* Projections shorten. *)
Theorem project_shortens X V :
  orthonormal_columns X -> inner (project X V) (project X V) <= inner V V.
Proof.
move=> oX; rewrite -subr_ge0.
have cross : inner (project X V) V = inner (project X V) (project X V).
  by rewrite -[RHS]project_self_adjoint project_idempotent.
have -> : inner V V - inner (project X V) (project X V) =
          inner (V - project X V) (V - project X V).
  move: (project X V) cross => W cross.
  by rewrite !innerBr !innerBl [inner V W]innerC cross; ring.
exact: inner_ge0.
Qed.

(* Embedded metric: R tangent, u = P_X(diag(l) R diag(k)).                    *)
Theorem embedded_descent X R :
  tangent X R ->
  l_low * k_low * inner R R <= inner R (project X (scale_both R)).
Proof.
by move=> tR; rewrite -project_self_adjoint project_fixes_tangent // scaled_inner_lower.
Qed.

Theorem embedded_direction_bounded X R :
  orthonormal_columns X ->
  inner (project X (scale_both R)) (project X (scale_both R)) <=
  (l_high * k_high) ^+ 2 * inner R R.
Proof.
by move=> oX; apply: le_trans (project_shortens _ oX) (scaled_norm_upper _).
Qed.

(* Canonical metric, statistics and scales taken in its coordinates: the same *)
(* constants.                                                                 *)
Definition canonical_direction c c' X R : 'M[F]_(d, p) :=
  project X (coordinates (- c') X (scale_both (coordinates c X R))).

Theorem canonical_descent c c' X R :
  orthonormal_columns X -> tangent X R ->
  (1 - c) ^+ 2 = 2^-1 -> (1 + c') * (1 - c) = 1 ->
  l_low * k_low * canonical_inner X R R <=
  canonical_inner X R (canonical_direction c c' X R).
Proof.
move=> oX tR half inverse.
have back V : coordinates c X (coordinates (- c') X V) = V.
  rewrite -{1}[c]opprK; apply: coordinates_inverse => //.
  by rewrite opprK mulrC.
rewrite /canonical_direction -project_canonically_self_adjoint //.
rewrite project_fixes_tangent // -!(coordinates_isometry _ _ oX half) back.
exact: scaled_inner_lower.
Qed.

Theorem canonical_direction_bounded c c' X R :
  orthonormal_columns X ->
  (1 - c) ^+ 2 = 2^-1 -> (1 + c') * (1 - c) = 1 ->
  canonical_inner X (canonical_direction c c' X R) (canonical_direction c c' X R) <=
  (l_high * k_high) ^+ 2 * canonical_inner X R R.
Proof.
move=> oX half inverse; rewrite /canonical_direction.
have back V : coordinates c X (coordinates (- c') X V) = V.
  rewrite -{1}[c]opprK; apply: coordinates_inverse => //.
  by rewrite opprK mulrC.
have shortens V : canonical_inner X (project X V) (project X V) <= canonical_inner X V V.
  have cross : canonical_inner X (project X V) V =
               canonical_inner X (project X V) (project X V).
    by rewrite -[RHS]project_canonically_self_adjoint // project_idempotent.
  rewrite -subr_ge0; move: (project X V) cross => W cross.
  have -> : canonical_inner X V V - canonical_inner X W W =
            canonical_inner X (V - W) (V - W).
    rewrite canonical_innerBl ![canonical_inner X _ (V - _)]canonical_innerC.
    by rewrite !canonical_innerBl [canonical_inner X V W]canonical_innerC cross; ring.
  have := canonical_inner_lower_bound (V - W) oX.
  by apply: le_trans; rewrite mulr_ge0 ?inner_ge0 // invr_ge0 ler0n.
apply: le_trans (shortens _) _.
rewrite -!(coordinates_isometry _ _ oX half) back.
exact: scaled_norm_upper.
Qed.

End Scaling.

Section Decrease.

Variable F : realFieldType.

(* One step: if along the direction f falls as a function with curvature at   *)
(* most L, the step t = a / (L b) with slope >= a g and square length <= b g  *)
(* lowers f by at least a^2 / (2 L b) times the squared gradient norm g.      *)
Theorem sufficient_decrease (f f_next g slope length a b L : F) :
  0 < L -> 0 < a -> 0 < b -> 0 <= g ->
  a * g <= slope -> length <= b * g ->
  f_next <= f - a / (L * b) * slope + L / 2%:R * (a / (L * b)) ^+ 2 * length ->
  f_next <= f - a ^+ 2 / (2%:R * L * b) * g.
Proof.
move=> L_gt0 a_gt0 b_gt0 g_ge0 slope_low length_high smooth.
set t := a / (L * b) in smooth.
have t_ge0 : 0 <= t by rewrite divr_ge0 ?mulr_ge0 // ltW.
apply: le_trans smooth _.
have : - t * slope + L / 2%:R * t ^+ 2 * length <=
       - t * (a * g) + L / 2%:R * t ^+ 2 * (b * g).
  apply: ler_add.
    by rewrite !mulNr ler_opp2 ler_wpmul2l.
  by rewrite ler_wpmul2l // mulr_ge0 ?sqr_ge0 // divr_ge0 ?ler0n // ltW.
rewrite -(ler_add2l f) !addrA mulNr; move/le_trans; apply.
rewrite le_eqVlt; apply/orP; left; apply/eqP; rewrite /t; field.
by rewrite !lt0r_neq0.
Qed.

(* The guarded step only needs the final inequality: a step that would break  *)
(* it is shortened or replaced until it holds. Then some gradient is small.   *)
Theorem guarded_convergence (f g : nat -> F) (c f_low : F) n :
  0 <= c -> (forall k, 0 <= g k) ->
  (forall k, (k < n)%N -> f k.+1 <= f k - c * g k) -> f_low <= f n -> (0 < n)%N ->
  exists2 k, (k < n)%N & n%:R * (c * g k) <= f 0%N - f_low.
Proof.
move=> c_ge0 g_ge0 decrease low n_gt0.
have telescope m : (m <= n)%N -> \sum_(k < m) c * g k <= f 0%N - f m.
  elim: m => [|m IH] m_le; first by rewrite big_ord0 subrr.
  rewrite big_ord_recr /=; apply: le_trans (ler_add (IH (ltnW m_le)) (lexx _)) _.
  have drop : 0 <= f m - c * g m - f m.+1 by rewrite subr_ge0 decrease.
  rewrite -subr_ge0.
  by have -> : f 0%N - f m.+1 - (f 0%N - f m + c * g m) = f m - c * g m - f m.+1 by ring.
have total : \sum_(k < n) c * g k <= f 0%N - f_low.
  by apply: le_trans (telescope n (leqnn n)) _; rewrite ler_add2l ler_opp2.
(* If every term exceeded the bound, so would their sum.                      *)
case: (boolP [exists k : 'I_n, n%:R * (c * g k) <= f 0%N - f_low]) => [/existsP[k]|].
  by exists (k : nat).
rewrite negb_exists => /forallP above.
have : f 0%N - f_low < \sum_(k < n) c * g k.
  have n_pos : 0 < n%:R :> F by rewrite ltr0n.
  rewrite -(ltr_pmul2l n_pos) mulr_sumr.
  have -> : n%:R * (f 0%N - f_low) = \sum_(k < n) (f 0%N - f_low).
    by rewrite sumr_const card_ord mulr_natl.
  rewrite -subr_gt0 -sumrB.
  case: n n_gt0 above {decrease low telescope total n_pos} => // m _ above.
  rewrite big_ord_recl ltr_paddr ?sumr_ge0 // => [k _|]; rewrite ?subr_ge0 ?subr_gt0.
    by apply: ltW; rewrite ltNge.
  by rewrite ltNge; apply: above.
by rewrite ltNge total.
Qed.

End Decrease.

Section AmbientCounterExample.

(* The bounds above fail in ambient coordinates of the canonical metric. Here *)
(* one row scale of 64 against 1 turns the direction uphill: the linear      *)
(* function <G, .> increases along the step to first order. (A ratio above    *)
(* 17 + 12 sqrt 2 is needed; see the statement.)                              *)
Definition ambient_whole : 'M[rat]_(3, 2) :=
  integer_matrix 3 2 [:: [:: 3; 0]; [:: -4; 0]; [:: 0; 5]].
Definition ambient_point : 'M[rat]_(3, 2) := 5%:R^-1 *: ambient_whole.
Definition ambient_gradient : 'M[rat]_(3, 2) :=
  integer_matrix 3 2 [:: [:: 0; 1]; [:: 0; 7]; [:: 5; 0]].
Definition ambient_riemannian : 'M[rat]_(3, 2) :=
  integer_matrix 3 2 [:: [:: 0; -2]; [:: 0; 11]; [:: 10; 0]].
Definition ambient_scale (i : 'I_3) : rat := if i == 0 then 64%:R else 1.
Definition ambient_scaled : 'M[rat]_(3, 2) :=
  integer_matrix 3 2 [:: [:: 0; -128]; [:: 0; 11]; [:: 10; 0]].

Lemma ambient_on_stiefel : orthonormal_columns ambient_point.
Proof.
have whole : ambient_whole^T *m ambient_whole = 25%:R *: 1%:M by compute_entries.
rewrite /orthonormal_columns /ambient_point trmxZ -scalemxAl -scalemxAr whole.
by rewrite !scalerA -[RHS]scale1r; congr (_ *: _); apply/eqP; vm_compute.
Qed.

Lemma ambient_normal_part : ambient_whole^T *m ambient_riemannian =
  25%:R *: integer_matrix 2 2 [:: [:: 0; -2]; [:: 2; 0]].
Proof. by compute_entries. Qed.

Lemma ambient_tangent : tangent ambient_point ambient_riemannian.
Proof.
rewrite /tangent /is_skew /ambient_point trmxZ -scalemxAl ambient_normal_part.
rewrite !trmxZ -!scalerN; congr (_ *: (_ *: _)); apply/matrixP=> i j; rewrite !mxE.
by case: i => [[|[|//]] ?]; case: j => [[|[|//]] ?].
Qed.

Lemma ambient_gradientE :
  canonical_gradient ambient_point ambient_gradient = ambient_riemannian.
Proof.
have inside : ambient_gradient^T *m ambient_whole =
    integer_matrix 2 2 [:: [:: 0; 25]; [:: -25; 0]] by compute_entries.
have outside : ambient_whole *m integer_matrix 2 2 [:: [:: 0; 25]; [:: -25; 0]] =
    25%:R *: (ambient_gradient - ambient_riemannian) by compute_entries.
rewrite /canonical_gradient /ambient_point -scalemxAr inside -scalemxAl -scalemxAr.
rewrite outside !scalerA; set c := (X in X *: _).
have -> : c = 1 by apply/eqP; vm_compute.
by rewrite scale1r opprB addrC subrK.
Qed.

Lemma ambient_scaledE :
  scale_both ambient_scale (fun=> 1) ambient_riemannian = ambient_scaled.
Proof.
apply/matrixP=> i j; rewrite !mxE /ambient_scale.
by case: i => [[|[|[|//]]] ?]; case: j => [[|[|//]] ?]; apply/eqP; vm_compute.
Qed.

Lemma ambient_slope :
  canonical_inner ambient_point ambient_riemannian ambient_scaled = - 1.
Proof.
have scaled_part : ambient_whole^T *m ambient_scaled =
    2%:R *: integer_matrix 2 2 [:: [:: 0; -214]; [:: 25; 0]] by compute_entries.
have point_part (V : 'M[rat]_(3, 2)) :
    ambient_point^T *m V = 5%:R^-1 *: (ambient_whole^T *m V).
  by rewrite /ambient_point trmxZ -scalemxAl.
have lengths : inner ambient_riemannian ambient_scaled = 477%:R.
  by rewrite !inner_sum !big_ord_recl !big_ord0 !mxE /=; apply/eqP; vm_compute.
have normal_lengths : inner (integer_matrix 2 2 [:: [:: 0; -2]; [:: 2; 0]])
    (integer_matrix 2 2 [:: [:: 0; -214]; [:: 25; 0]]) = 478%:R.
  by rewrite !inner_sum !big_ord_recl !big_ord0 !mxE /=; apply/eqP; vm_compute.
rewrite canonical_innerE !point_part ambient_normal_part scaled_part.
rewrite !innerZl !innerZr lengths normal_lengths.
by apply/eqP; vm_compute.
Qed.

Theorem ambient_scaling_can_ascend :
  exists (X G : 'M[rat]_(3, 2)) (l : 'I_3 -> rat),
  let R := canonical_gradient X G in
  let D := scale_both l (fun=> 1) R in
  [/\ orthonormal_columns X, forall i, 1 <= l i <= 64%:R,
      canonical_inner X R (project X D) < 0 &
      0 < inner G (- project X D)].
Proof.
exists ambient_point, ambient_gradient, ambient_scale => R D.
have oX := ambient_on_stiefel.
have slope : canonical_inner ambient_point R (project ambient_point D) = - 1.
  rewrite -project_canonically_self_adjoint // /R ambient_gradientE.
  rewrite (project_fixes_tangent ambient_tangent).
  by rewrite /D /R ambient_gradientE ambient_scaledE ambient_slope.
have riesz : inner ambient_gradient (project ambient_point D) = - 1.
  by rewrite -(canonical_riesz _ oX (project_tangent _ oX)) slope.
split=> //; first by move=> i; rewrite /ambient_scale; case: (i == 0).
  by rewrite slope.
by rewrite innerNr riesz.
Qed.

End AmbientCounterExample.
