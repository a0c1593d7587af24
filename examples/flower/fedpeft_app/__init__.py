"""A Flower app: both ends come from `fedpeft_ext.flower`."""
