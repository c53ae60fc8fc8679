"""RMS norm, alone and behind the residual addition."""
