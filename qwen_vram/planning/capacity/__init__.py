"""Memory that devices offer, and the check if an estimate fits it."""
