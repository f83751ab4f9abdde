"""The method, step by step: initial set, rounds of training and Pareto search, choice for a budget; and their loop."""
