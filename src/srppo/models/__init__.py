"""Loading models, their roles and their frozen log-probabilities."""
