"""Measurements that a user can repeat: ``subspace-meta bench``."""
