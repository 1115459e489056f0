"""srppo: align a language model from demonstrations alone (Self-Rewarding PPO)."""
