(* Concrete matrices with rational entries, for counter-examples. A claim     *)
(* about them is a finite list of identities between numbers.                 *)
From mathcomp Require Import all_ssreflect fingroup perm all_algebra.
From mathcomp Require Import ring.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import GRing.Theory Num.Theory Order.POrderTheory.
Local Open Scope ring_scope.

Definition integer_matrix d p (entries : seq (seq int)) : 'M[rat]_(d, p) :=
  \matrix_(i, j) (nth 0 (nth [::] entries i) j)%:~R.

(* For matrices of at most five rows and two columns.                         *)
Ltac compute_entries :=
  let i := fresh "i" in let j := fresh "j" in
  apply/matrixP=> i j; rewrite !mxE !big_ord_recl big_ord0 !mxE;
  case: i => [[|[|[|[|[|//]]]]] ?] //=; case: j => [[|[|//]] ?] //=;
  rewrite ?mul_mx_diag ?mxE ?big_ord_recl ?big_ord0 ?mxE /=;
  apply/eqP; vm_compute.
