(* The cubic Newton-Schulz iteration towards the polar factor: what it does   *)
(* to matrices, to padding, and to singular values.                           *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.
From SubspaceMeta Require Import matrices stiefel.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section Matrix.

Variable F : realFieldType.

Definition newton_schulz d p (X : 'M[F]_(d, p)) : 'M[F]_(d, p) :=
  2^-1 *: (X *m (3%:R *: 1%:M - X^T *m X)).

Lemma newton_schulzE d p (X : 'M[F]_(d, p)) :
  newton_schulz X = 2^-1 *: (3%:R *: X - X *m X^T *m X).
Proof. by rewrite /newton_schulz; linear_combination. Qed.

(* The left factor may be tall: orthonormal columns suffice. The right factor *)
(* may be wide: orthonormal rows suffice.                                     *)
Theorem newton_schulz_equivariant d p k l
    (P : 'M[F]_(k, d)) (Q : 'M[F]_(p, l)) (X : 'M[F]_(d, p)) :
  orthonormal_columns P -> Q *m Q^T = 1%:M ->
  newton_schulz (P *m X *m Q) = P *m newton_schulz X *m Q.
Proof.
move=> oP oQ; rewrite !newton_schulzE.
have -> : P *m X *m Q *m (P *m X *m Q)^T *m (P *m X *m Q) =
          P *m (X *m X^T *m X) *m Q.
  rewrite !trmx_mul !mulmxA -(mulmxA _ Q Q^T) oQ mulmx1.
  by rewrite -(mulmxA _ P^T P) oP mulmx1.
linear_combination.
Qed.

Theorem newton_schulz_iterate_equivariant d p k l n
    (P : 'M[F]_(k, d)) (Q : 'M[F]_(p, l)) (X : 'M[F]_(d, p)) :
  orthonormal_columns P -> Q *m Q^T = 1%:M ->
  iter n (@newton_schulz k l) (P *m X *m Q) = P *m iter n (@newton_schulz d p) X *m Q.
Proof.
by move=> oP oQ; elim: n => //= n ->; apply: newton_schulz_equivariant.
Qed.

(* Padding: zero columns and zero rows stay zero, and the block inside does   *)
(* not notice them.                                                           *)
Theorem newton_schulz_zero_column d p (X : 'M[F]_(d, p)) j :
  col j X = 0 -> col j (newton_schulz X) = 0.
Proof.
rewrite !colE newton_schulzE => zero.
by rewrite -scalemxAl mulmxBl -scalemxAl -mulmxA zero mulmx0 scaler0 subrr scaler0.
Qed.

Theorem newton_schulz_zero_row d p (X : 'M[F]_(d, p)) i :
  row i X = 0 -> row i (newton_schulz X) = 0.
Proof.
rewrite !rowE /newton_schulz => zero.
by rewrite -scalemxAr mulmxA zero mul0mx scaler0.
Qed.

Theorem newton_schulz_padded d p a b (X : 'M[F]_(d, p)) :
  newton_schulz (block_mx X 0 0 0 : 'M_(d + a, p + b)) =
  block_mx (newton_schulz X) 0 0 0.
Proof.
rewrite !newton_schulzE tr_block_mx !trmx_zero !mulmx_block.
rewrite !(mulmx0, mul0mx, addr0) scale_block_mx opp_block_mx add_block_mx.
by rewrite scale_block_mx !(scaler0, oppr0, addr0).
Qed.

(* The defect I - X^T X after one step, for every size and without singular   *)
(* values: (I - S)^2 (I - S/4) with S = X^T X. Convergence is quadratic.      *)
Theorem newton_schulz_defect d p (X : 'M[F]_(d, p)) (S := X^T *m X) :
  1%:M - (newton_schulz X)^T *m newton_schulz X =
  (1%:M - S) *m (1%:M - S) *m (1%:M - 4%:R^-1 *: S).
Proof.
have -> : (newton_schulz X)^T *m newton_schulz X =
   (2^-1 * 2^-1) *: ((3%:R *: 1%:M - S) *m S *m (3%:R *: 1%:M - S)).
  rewrite /newton_schulz -/S trmxZ trmx_mul trmxB trmxZ trmx1.
  rewrite {1}/S trmx_mul trmxK -/S -scalemxAl -scalemxAr scalerA.
  by rewrite !mulmxA -[_ *m X^T *m X]mulmxA.
by move: S => S; linear_combination.
Qed.

End Matrix.

Section SingularValues.

Variable F : realFieldType.
Implicit Types s t : F.

Definition newton_schulz_scalar s : F := s * (3%:R - s ^+ 2) / 2%:R.
Local Notation f := newton_schulz_scalar.

(* One step acts on each singular value by f and leaves the singular vectors. *)
Theorem newton_schulz_singular_values d p k
    (U : 'M[F]_(d, k)) (V : 'M[F]_(p, k)) (s : 'rV[F]_k) :
  orthonormal_columns U -> orthonormal_columns V ->
  newton_schulz (U *m diag_mx s *m V^T) =
  U *m diag_mx (\row_j f (s 0 j)) *m V^T.
Proof.
move=> oU oV; rewrite newton_schulz_equivariant ?trmxK // newton_schulzE.
congr (_ *m _ *m _); rewrite tr_diag_mx !mulmx_diag.
apply/matrixP=> i j; rewrite !mxE; case: eqP => [->|_].
  by rewrite !mulr1n /f; move: (s 0 j) => x; field.
by rewrite !mulr0n mulr0 subrr mulr0.
Qed.

Theorem newton_schulz_gap s : 1 - f s = (1 - s) ^+ 2 * (s + 2%:R) / 2%:R.
Proof. by rewrite /f; field. Qed.

Theorem newton_schulz_positive s : 0 < s -> s ^+ 2 < 3%:R -> 0 < f s.
Proof.
move=> s_gt0 s_lt; rewrite /f divr_gt0 ?ltr0n // mulr_gt0 //.
by rewrite subr_gt0.
Qed.

Theorem newton_schulz_le1 s : 0 < s -> f s <= 1.
Proof.
move=> s_gt0; rewrite -subr_ge0 newton_schulz_gap.
by rewrite divr_ge0 ?ler0n // mulr_ge0 ?sqr_ge0 // addr_ge0 ?ler0n // ltW.
Qed.

(* On (0, 1] the values rise, and the order of singular values is kept.       *)
Theorem newton_schulz_increases s : 0 < s -> s <= 1 -> s <= f s.
Proof.
move=> s_gt0 s_le1; rewrite -subr_ge0.
have -> : f s - s = s * ((1 - s) * (1 + s)) / 2%:R by rewrite /f; field.
rewrite divr_ge0 ?ler0n // mulr_ge0 ?(ltW s_gt0) // mulr_ge0 ?subr_ge0 //.
by rewrite addr_ge0 ?ler01 // ltW.
Qed.

Theorem newton_schulz_strictly_increases s : 0 < s -> s < 1 -> s < f s.
Proof.
move=> s_gt0 s_lt1; rewrite -subr_gt0.
have -> : f s - s = s * ((1 - s) * (1 + s)) / 2%:R by rewrite /f; field.
rewrite divr_gt0 ?ltr0n // mulr_gt0 // mulr_gt0 ?subr_gt0 //.
by rewrite addr_gt0 ?ltr01.
Qed.

Theorem newton_schulz_monotone s t : 0 <= s -> s <= t -> t <= 1 -> f s <= f t.
Proof.
move=> s_ge0 s_le_t t_le1; rewrite -subr_ge0.
have s_le1 : s <= 1 by apply: le_trans t_le1.
have t_ge0 : 0 <= t by apply: le_trans s_le_t.
have -> : f t - f s =
    (t - s) * ((1 - t ^+ 2) + (1 - t * s) + (1 - s ^+ 2)) / 2%:R.
  by rewrite /f; field.
rewrite divr_ge0 ?ler0n // mulr_ge0 ?subr_ge0 //.
have s2 : 0 <= 1 - s ^+ 2 by rewrite subr_ge0 exprn_ile1.
have t2 : 0 <= 1 - t ^+ 2 by rewrite subr_ge0 exprn_ile1.
have ts : 0 <= 1 - t * s by rewrite subr_ge0 mulr_ile1.
by rewrite addr_ge0 // addr_ge0.
Qed.

(* The gap closes: with c = s (1 + s) / 2 it is at most 1 / (1 + n c) after n *)
(* steps (a crude bound that needs no logarithm; quadratic in the end).       *)
Lemma newton_schulz_gap_step s0 s :
  0 < s0 -> s0 <= s -> s <= 1 ->
  1 - f s <= (1 - s) * (1 - s0 * (1 + s0) / 2%:R).
Proof.
move=> s0_gt0 s0_le s_le1.
have s_gt0 : 0 < s by apply: lt_le_trans s0_le.
have -> : 1 - f s = (1 - s) * (1 - s * (1 + s) / 2%:R) by rewrite /f; field.
rewrite ler_wpmul2l ?subr_ge0 // ler_add2l ler_opp2 ler_pmul2r ?invr_gt0 ?ltr0n //.
have s0_ge0 := ltW s0_gt0.
by apply: ler_pmul; rewrite ?ler_add2l ?addr_ge0 ?ler01.
Qed.

Lemma newton_schulz_iterates n s :
  0 < s -> s <= 1 -> s <= iter n f s <= 1.
Proof.
move=> s_gt0 s_le1; elim: n => [|n /andP[lower upper]] /=; first by rewrite lexx.
have positive : 0 < iter n f s by apply: lt_le_trans lower.
by rewrite newton_schulz_le1 // andbT (le_trans lower) ?newton_schulz_increases.
Qed.

Theorem newton_schulz_rate n s :
  0 < s -> s <= 1 ->
  (1 - iter n f s) * (1 + n%:R * (s * (1 + s) / 2%:R)) <= 1.
Proof.
move=> s_gt0 s_le1; set c := s * (1 + s) / 2%:R.
have c_gt0 : 0 < c by rewrite divr_gt0 ?ltr0n // mulr_gt0 ?addr_gt0 ?ltr01.
have c_le1 : c <= 1.
  rewrite /c ler_pdivr_mulr ?ltr0n // mul1r.
  have : s * (1 + s) <= 1 * (1 + 1).
    by have s_ge0 := ltW s_gt0; apply: ler_pmul; rewrite ?ler_add2l ?addr_ge0 ?ler01.
  by rewrite mul1r.
elim: n => [|n IH] /=.
  by rewrite mul0r addr0 mulr1 ler_subl_addr ler_addl ltW.
have /andP[lower upper] := newton_schulz_iterates n s_gt0 s_le1.
have step := newton_schulz_gap_step s_gt0 lower upper; rewrite -/c in step.
have weight : 0 <= 1 + n.+1%:R * c.
  by rewrite addr_ge0 ?ler01 // mulr_ge0 ?ler0n // ltW.
apply: (le_trans (ler_wpmul2r weight step)); apply: le_trans IH.
rewrite -mulrA ler_wpmul2l ?subr_ge0 // -subr_ge0.
have -> : 1 + n%:R * c - (1 - c) * (1 + n.+1%:R * c) = n.+1%:R * c ^+ 2.
  by rewrite -addn1 natrD; ring.
by rewrite mulr_ge0 ?ler0n // sqr_ge0.
Qed.

End SingularValues.

Section Limit.

Variable F : archiFieldType.

Theorem newton_schulz_converges (s epsilon : F) :
  0 < s -> s ^+ 2 < 3%:R -> 0 < epsilon ->
  exists N, forall n, (N <= n)%N ->
    0 <= 1 - iter n (@newton_schulz_scalar F) (newton_schulz_scalar s) < epsilon.
Proof.
move=> s_gt0 s_lt epsilon_gt0; set t := newton_schulz_scalar s.
have t_gt0 : 0 < t by apply: newton_schulz_positive.
have t_le1 : t <= 1 by apply: newton_schulz_le1.
set c := t * (1 + t) / 2%:R.
have c_gt0 : 0 < c by rewrite divr_gt0 ?ltr0n // mulr_gt0 ?addr_gt0 ?ltr01.
exists (Num.bound (epsilon * c)^-1) => n N_le_n.
have /andP[_ upper] := newton_schulz_iterates n t_gt0 t_le1.
rewrite subr_ge0 upper /=.
have := newton_schulz_rate n t_gt0 t_le1; rewrite -/c => rate.
have gap_ge0 : 0 <= 1 - iter n (@newton_schulz_scalar F) t by rewrite subr_ge0.
have far : (epsilon * c)^-1 < n%:R.
  apply: lt_le_trans (_ : (Num.bound (epsilon * c)^-1)%:R <= _); last by rewrite ler_nat.
  by apply: archi_boundP; rewrite invr_ge0 ltW // mulr_gt0.
have one_lt : 1 < epsilon * (n%:R * c).
  rewrite mulrCA -ltr_pdivr_mulr; last exact: mulr_gt0.
  by rewrite div1r.
have weight : 0 < 1 + n%:R * c.
  by rewrite ltr_paddr ?ltr01 // mulr_ge0 ?ler0n // ltW.
rewrite -(ltr_pmul2r weight); apply: le_lt_trans rate _.
by apply: lt_trans one_lt _; rewrite ltr_pmul2l // ltr_addr ltr01.
Qed.

End Limit.
