"""GPU kernels in Triton for what a switch spends its time on; the plain torch path beside each is its tested oracle."""
