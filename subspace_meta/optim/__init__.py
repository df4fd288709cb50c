"""Every optimizer of this library as a ``torch.optim.Optimizer``: for models, ``loss.backward()`` and schedulers.

The shell keeps tensors and names together, and nothing else: each step is the functional optimizer's. The parameters on
manifolds are those that a rule names; the others go to another torch optimizer (AdamW unless told otherwise), which is
stepped along, so that one object serves the whole model. Parameters stay plain ``torch.nn.Parameter``: no
parametrization, nothing to remove before saving the model.

====================  ================================================================================================
``names``             what the user hands in, as groups of named parameters
``options``           which keys a parameter group has, and what becomes of each
``states``            the functional state of many matrices, seen as the state of each parameter, and back
``cohorts``           parameters that are stepped together: their functional optimizer, its state, their last values
``sharding``          parameters of which every rank has a part: owners, exchanges, errors, layout for checkpoints
``contents``          what an optimizer consists of: settings, and what is kept for each group
``construction``      settings and parameter groups, found right before anything is changed
``stepping``          the pieces of a step: what is to be done, the step, a look at its results, writing them
``ranks``             the same where parameters are split over ranks: to their owners, and back
``saving``            state and options in torch's layout, and back
``shell``             the optimizer as torch knows one: holds the contents, hands them to the four above
``learned``           the shell with the learned optimizer inside
====================  ================================================================================================

What the words of torch.optim mean here:

* ``lr``: of a hand-made optimizer its learning rate; of the learned one a factor of its steps, 1 unless a scheduler
  changes it. The other optimizer has its own.
* weight decay: refused on parameter groups here. Columns of unit length cannot decay, and on other manifolds there is
  no zero to decay to. The other optimizer has its own.
* parameters without a gradient in a step, frozen ones for instance, stay where they are (one that had gradients before
  sees a zero one in its state); the first gradient starts the state.
* a step is taken by all parameters or by none: what would not be finite, or what the other optimizer refuses, changes
  nothing.
* clipping by a global norm changes what the hand-made optimizers see; of the learned one it changes the next few steps
  little, and a constant factor nothing.
"""

from subspace_meta.optim.cohorts import ProjectionWarning
from subspace_meta.optim.learned import SubspaceMeta
from subspace_meta.optim.options import options
from subspace_meta.optim.shell import Riemannian

__all__ = ["ProjectionWarning", "Riemannian", "SubspaceMeta", "options"]
