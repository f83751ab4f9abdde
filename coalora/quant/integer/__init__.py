"""Group-wise integers: the scheme `int`."""
