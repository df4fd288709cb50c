"""Meta-training: compiled inner loops, meta-gradients, the outer loop."""
