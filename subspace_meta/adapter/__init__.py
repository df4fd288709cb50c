"""The adapter R -> D: packed row and column statistics, features, and the network that turns them into scales."""
