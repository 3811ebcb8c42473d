"""Learning: rollouts, the training of the gate and of specialists, on Ray Data and Ray Train."""
