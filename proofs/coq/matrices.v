(* Vocabulary shared by all files: the trace inner product of rectangular     *)
(* matrices, symmetric and skew parts, orthonormal columns, definiteness.     *)
(* Everything is over an arbitrary ordered field, for arbitrary sizes.        *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Section Definitions.

Variable F : realFieldType.

Definition sym n (A : 'M[F]_n) : 'M[F]_n := 2^-1 *: (A + A^T).
Definition is_symmetric n (A : 'M[F]_n) : Prop := A^T = A.
Definition is_skew n (A : 'M[F]_n) : Prop := A^T = - A.

(* The ambient Euclidean metric of R^{m x n}. *)
Definition inner m n (A B : 'M[F]_(m, n)) : F := \tr (A^T *m B).

Definition orthonormal_columns d p (X : 'M[F]_(d, p)) : Prop :=
  X^T *m X = 1%:M.

(* For square matrices one equation implies the other (orthogonalC below). *)
Definition is_orthogonal n (Q : 'M[F]_n) : Prop := Q^T *m Q = 1%:M.

Definition quadratic n (A : 'M[F]_n) (x : 'cV[F]_n) : F :=
  (x^T *m A *m x) 0 0.

Definition positive_definite n (A : 'M[F]_n) : Prop :=
  forall x : 'cV[F]_n, x != 0 -> 0 < quadratic A x.

Definition positive_semidefinite n (A : 'M[F]_n) : Prop :=
  forall x : 'cV[F]_n, 0 <= quadratic A x.

End Definitions.

Section Transpose.

Variables (F : realFieldType) (m n : nat).
Implicit Types A B : 'M[F]_(m, n).

Lemma trmxD A B : (A + B)^T = A^T + B^T.
Proof. exact: linearD. Qed.

Lemma trmxB A B : (A - B)^T = A^T - B^T.
Proof. exact: linearB. Qed.

Lemma trmxN A : (- A)^T = - A^T.
Proof. exact: linearN. Qed.

Lemma trmxZ a A : (a *: A)^T = a *: A^T.
Proof. exact: linearZ. Qed.

Lemma trmx_zero : (0 : 'M[F]_(m, n))^T = 0.
Proof. exact: linear0. Qed.

End Transpose.

(* Pushes transposition down to atoms, and products down to sums of products. *)
Ltac push_transpose :=
  rewrite ?(trmx_mul, trmxD, trmxB, trmxN, trmxZ, trmx_zero, trmxK, trmx1).
Ltac push_product :=
  rewrite ?(mulmxDl, mulmxDr, mulmxBl, mulmxBr, mulNmx, mulmxN, mulmxA,
            mulmx0, mul0mx, mulmx1, mul1mx).

Ltac distribute :=
  push_transpose; push_product;
  do 3 (rewrite -?(scalemxAl, scalemxAr); push_product).

(* The same entry can carry differently written types, which the ring and     *)
(* field tactics would take for two different letters.                        *)
Ltac entries_to_letters :=
  repeat match goal with
  | |- context [fun_of_matrix ?A ?i ?j] => move: (fun_of_matrix A i j) => ?
  end.

(* Equality of two linear combinations of matrix products: products become    *)
(* opaque letters, what is left is an identity of scalars, entry by entry.    *)
Ltac linear_combination :=
  distribute;
  repeat match goal with
  | |- context [?A *m ?B] => move: (A *m B) => ?
  end;
  repeat match goal with
  | |- context [@scalar_mx _ ?n 1] => move: (@scalar_mx _ n 1) => ?
  end;
  let i := fresh "i" in let j := fresh "j" in
  apply/matrixP=> i j; rewrite !mxE; entries_to_letters; by field.

Section Inner.

Variables (F : realFieldType) (m n : nat).
Implicit Types A B C : 'M[F]_(m, n).

Lemma inner_sum A B : inner A B = \sum_i \sum_j A i j * B i j.
Proof.
rewrite /inner /mxtrace exchange_big /=; apply: eq_bigr => j _.
by rewrite mxE; apply: eq_bigr => i _; rewrite mxE.
Qed.

Lemma innerC A B : inner A B = inner B A.
Proof. by rewrite /inner -mxtrace_tr trmx_mul trmxK. Qed.

Lemma innerDl A B C : inner (A + B) C = inner A C + inner B C.
Proof. by rewrite /inner trmxD mulmxDl linearD. Qed.

Lemma innerDr A B C : inner A (B + C) = inner A B + inner A C.
Proof. by rewrite /inner mulmxDr linearD. Qed.

Lemma innerNl A B : inner (- A) B = - inner A B.
Proof. by rewrite /inner trmxN mulNmx linearN. Qed.

Lemma innerNr A B : inner A (- B) = - inner A B.
Proof. by rewrite /inner mulmxN linearN. Qed.

Lemma innerBl A B C : inner (A - B) C = inner A C - inner B C.
Proof. by rewrite innerDl innerNl. Qed.

Lemma innerBr A B C : inner A (B - C) = inner A B - inner A C.
Proof. by rewrite innerDr innerNr. Qed.

Lemma innerZl a A B : inner (a *: A) B = a * inner A B.
Proof. by rewrite /inner trmxZ -scalemxAl linearZ. Qed.

Lemma innerZr a A B : inner A (a *: B) = a * inner A B.
Proof. by rewrite /inner -scalemxAr linearZ. Qed.

Lemma inner0l A : inner 0 A = 0.
Proof. by rewrite /inner trmx_zero mul0mx linear0. Qed.

Lemma inner0r A : inner A 0 = 0.
Proof. by rewrite /inner mulmx0 linear0. Qed.

Lemma inner_ge0 A : 0 <= inner A A.
Proof.
rewrite inner_sum; apply: sumr_ge0 => i _; apply: sumr_ge0 => j _.
by rewrite -expr2 sqr_ge0.
Qed.

Lemma inner_eq0 A : inner A A = 0 -> A = 0.
Proof.
rewrite inner_sum => /eqP.
rewrite psumr_eq0 => [|i _]; last first.
  by apply: sumr_ge0 => j _; rewrite -expr2 sqr_ge0.
move=> /allP rows; apply/matrixP=> i j; rewrite mxE.
have /eqP := rows i (mem_index_enum i).
move/eqP; rewrite psumr_eq0 => [/allP columns|k _]; last by rewrite -expr2 sqr_ge0.
have := columns j (mem_index_enum j).
by rewrite /= -expr2 sqrf_eq0 => /eqP.
Qed.

Lemma inner_gt0 A : A != 0 -> 0 < inner A A.
Proof.
move=> A_neq0; rewrite lt_neqAle inner_ge0 andbT eq_sym.
by apply: contra A_neq0 => /eqP /inner_eq0 ->.
Qed.

End Inner.

Section InnerProducts.

Variable F : realFieldType.

Lemma inner_mulmxl m n k (A : 'M[F]_(m, n)) (B : 'M[F]_(n, k)) C :
  inner (A *m B) C = inner B (A^T *m C).
Proof. by rewrite /inner trmx_mul mulmxA. Qed.

Lemma inner_mulmxr m n k (A : 'M[F]_(m, n)) (B : 'M[F]_(n, k)) C :
  inner (A *m B) C = inner A (C *m B^T).
Proof. by rewrite /inner trmx_mul -mulmxA mxtrace_mulC mulmxA. Qed.

Lemma inner_trmx m n (A B : 'M[F]_(m, n)) : inner A^T B^T = inner A B.
Proof. by rewrite [RHS]innerC /inner trmxK mxtrace_mulC. Qed.

Lemma sym_is_symmetric n (A : 'M[F]_n) : is_symmetric (sym A).
Proof. by rewrite /is_symmetric /sym trmxZ trmxD trmxK addrC. Qed.

Lemma sym_symmetric n (A : 'M[F]_n) : is_symmetric A -> sym A = A.
Proof.
by rewrite /is_symmetric /sym => ->; linear_combination.
Qed.

Lemma sym_skew n (A : 'M[F]_n) : is_skew A -> sym A = 0.
Proof. by rewrite /is_skew /sym => ->; rewrite subrr scaler0. Qed.

Lemma symB n (A B : 'M[F]_n) : sym (A - B) = sym A - sym B.
Proof. by rewrite /sym; linear_combination. Qed.

Lemma skew_part n (A : 'M[F]_n) : is_skew (A - sym A).
Proof. by rewrite /is_skew /sym; linear_combination. Qed.

(* Symmetric and skew matrices are orthogonal to each other. *)
Lemma inner_symmetric_skew n (S W : 'M[F]_n) :
  is_symmetric S -> is_skew W -> inner S W = 0.
Proof.
move=> symmetricS skewW; have := inner_trmx S W.
rewrite symmetricS skewW innerNr => /esym /eqP.
by rewrite -addr_eq0 -mulr2n mulrn_eq0 /= => /eqP.
Qed.

Lemma inner_sym n (A B : 'M[F]_n) : inner (sym A) B = inner A (sym B).
Proof.
rewrite /sym innerZl innerZr innerDl innerDr; congr (_ * (_ + _)).
by rewrite -inner_trmx trmxK.
Qed.

Lemma orthogonalC n (Q : 'M[F]_n) : is_orthogonal Q -> Q *m Q^T = 1%:M.
Proof. exact: mulmx1C. Qed.

Lemma orthogonal_trmx n (Q : 'M[F]_n) : is_orthogonal Q -> is_orthogonal Q^T.
Proof. by move/orthogonalC; rewrite /is_orthogonal trmxK. Qed.

Lemma orthogonal_unitmx n (Q : 'M[F]_n) : is_orthogonal Q -> Q \in unitmx.
Proof. by move/mulmx1_unit => []. Qed.

Lemma orthogonal_invmx n (Q : 'M[F]_n) : is_orthogonal Q -> invmx Q = Q^T.
Proof.
move=> orthogonalQ; have unitQ := orthogonal_unitmx orthogonalQ.
by rewrite -[RHS]mulmx1 -(mulmxV unitQ) mulmxA orthogonalQ mul1mx.
Qed.

(* Permutation matrices are orthogonal: what is shown for orthogonal factors  *)
(* holds for permutations of rows and columns.                                *)
Lemma perm_orthogonal n (s : 'S_n) : is_orthogonal (perm_mx s : 'M[F]_n).
Proof. by rewrite /is_orthogonal tr_perm_mx -perm_mxM mulVg perm_mx1. Qed.

(* Orthonormal columns never lengthen: I - X X^T is positive semidefinite.    *)
Lemma inner_projected_le d p k (X : 'M[F]_(d, p)) (U : 'M[F]_(d, k)) :
  orthonormal_columns X ->
  inner (X^T *m U) (X^T *m U) <= inner U U.
Proof.
move=> orthonormalX; rewrite -subr_ge0.
set Y := X^T *m U.
have XY_U : inner (X *m Y) U = inner Y Y by rewrite inner_mulmxl.
have U_XY : inner U (X *m Y) = inner Y Y by rewrite innerC.
have XY_XY : inner (X *m Y) (X *m Y) = inner Y Y.
  by rewrite inner_mulmxl mulmxA orthonormalX mul1mx.
have -> : inner U U - inner Y Y = inner (U - X *m Y) (U - X *m Y).
  by rewrite innerBl !innerBr XY_U U_XY XY_XY; ring.
exact: inner_ge0.
Qed.

End InnerProducts.

Section Definiteness.

Variable F : realFieldType.

Lemma quadratic_inner n (A : 'M[F]_n) (x : 'cV[F]_n) :
  quadratic A x = inner x (A *m x).
Proof. by rewrite /quadratic /inner mulmxA [\tr _]big_ord1. Qed.

Lemma quadraticD n (A B : 'M[F]_n) x :
  quadratic (A + B) x = quadratic A x + quadratic B x.
Proof. by rewrite !quadratic_inner mulmxDl innerDr. Qed.

Lemma quadraticZ n a (A : 'M[F]_n) x : quadratic (a *: A) x = a * quadratic A x.
Proof. by rewrite !quadratic_inner -scalemxAl innerZr. Qed.

Lemma quadratic_congruence m n (A : 'M[F]_m) (B : 'M[F]_(m, n)) x :
  quadratic (B^T *m A *m B) x = quadratic A (B *m x).
Proof. by rewrite /quadratic trmx_mul !mulmxA. Qed.

Lemma positive_definite_semi n (A : 'M[F]_n) :
  positive_definite A -> positive_semidefinite A.
Proof.
move=> definiteA x; have [->|/definiteA/ltW //] := eqVneq x 0.
by rewrite quadratic_inner mulmx0 inner0r.
Qed.

Lemma positive_definite1 n : positive_definite (1%:M : 'M[F]_n).
Proof. by move=> x x_neq0; rewrite quadratic_inner mul1mx inner_gt0. Qed.

Lemma gram_semidefinite m n (B : 'M[F]_(m, n)) :
  positive_semidefinite (B^T *m B).
Proof.
by move=> x; rewrite quadratic_inner -mulmxA -inner_mulmxl inner_ge0.
Qed.

Lemma positive_definiteD n (A B : 'M[F]_n) :
  positive_definite A -> positive_semidefinite B -> positive_definite (A + B).
Proof.
by move=> definiteA semiB x x_neq0; rewrite quadraticD ltr_paddr ?definiteA.
Qed.

Lemma positive_definiteZ n a (A : 'M[F]_n) :
  0 < a -> positive_definite A -> positive_definite (a *: A).
Proof.
by move=> a_gt0 definiteA x x_neq0; rewrite quadraticZ mulr_gt0 ?definiteA.
Qed.

Lemma positive_semidefiniteZ n a (A : 'M[F]_n) :
  0 <= a -> positive_semidefinite A -> positive_semidefinite (a *: A).
Proof. by move=> a_ge0 semiA x; rewrite quadraticZ mulr_ge0. Qed.

Lemma congruence_semidefinite m n (A : 'M[F]_m) (B : 'M[F]_(m, n)) :
  positive_semidefinite A -> positive_semidefinite (B^T *m A *m B).
Proof. by move=> semiA x; rewrite quadratic_congruence. Qed.

Lemma congruence_definite n (A B : 'M[F]_n) :
  positive_definite A -> B \in unitmx -> positive_definite (B^T *m A *m B).
Proof.
move=> definiteA unitB x x_neq0; rewrite quadratic_congruence definiteA //.
by apply: contra x_neq0 => /eqP Bx0; rewrite -[x](mulKmx unitB) Bx0 mulmx0.
Qed.

(* A square matrix that annihilates no column is invertible. *)
Lemma injective_unitmx n (A : 'M[F]_n) :
  (forall x : 'cV[F]_n, A *m x = 0 -> x = 0) -> A \in unitmx.
Proof.
move=> injectiveA; rewrite -unitmx_tr -row_free_unit.
apply: inj_row_free => v /(congr1 trmx); rewrite trmx_mul trmxK trmx_zero.
by move/injectiveA/(congr1 trmx); rewrite trmxK trmx_zero.
Qed.

Lemma positive_definite_unitmx n (A : 'M[F]_n) :
  positive_definite A -> A \in unitmx.
Proof.
move=> definiteA; apply: injective_unitmx => x Ax0.
apply/eqP; apply: contraT => /definiteA.
by rewrite quadratic_inner Ax0 inner0r ltxx.
Qed.

Lemma symmetric_invmx n (A : 'M[F]_n) :
  is_symmetric A -> is_symmetric (invmx A).
Proof. by rewrite /is_symmetric trmx_inv => ->. Qed.

Lemma positive_definite_invmx n (A : 'M[F]_n) :
  is_symmetric A -> positive_definite A -> positive_definite (invmx A).
Proof.
move=> symmetricA definiteA; have unitA := positive_definite_unitmx definiteA.
have -> : invmx A = (invmx A)^T *m A *m invmx A.
  by rewrite (symmetric_invmx symmetricA) mulVmx ?mul1mx.
by apply: congruence_definite; rewrite ?unitmx_inv.
Qed.

(* The trace form of a definite matrix on rectangular matrices: column by     *)
(* column it is the quadratic form.                                           *)
Lemma inner_columns n k (A : 'M[F]_n) (B : 'M[F]_(n, k)) :
  inner B (A *m B) = \sum_j quadratic A (col j B).
Proof.
rewrite /inner /mxtrace; apply: eq_bigr => j _.
rewrite /quadratic -mulmxA !mxE; apply: eq_bigr => i _.
rewrite !mxE; congr (_ * _); apply: eq_bigr => k' _; by rewrite !mxE.
Qed.

Lemma inner_semidefinite n k (A : 'M[F]_n) (B : 'M[F]_(n, k)) :
  positive_semidefinite A -> 0 <= inner B (A *m B).
Proof. by move=> semiA; rewrite inner_columns; apply: sumr_ge0. Qed.

Lemma inner_definite_eq0 n k (A : 'M[F]_n) (B : 'M[F]_(n, k)) :
  positive_definite A -> inner B (A *m B) = 0 -> B = 0.
Proof.
move=> definiteA; rewrite inner_columns => /eqP.
rewrite psumr_eq0 => [/allP columns|j _]; last exact: positive_definite_semi.
apply/matrixP=> i j; rewrite mxE.
have /eqP zero := columns j (mem_index_enum j).
have : col j B = 0.
  by apply/eqP; apply: contraT => /definiteA; rewrite zero ltxx.
by move/matrixP/(_ i 0); rewrite !mxE.
Qed.

End Definiteness.
