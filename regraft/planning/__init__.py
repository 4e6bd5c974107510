"""Rules, and what they mean for one model: the plan."""
