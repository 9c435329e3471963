"""Floor 5: networks and weights of other projects. Nothing that is read here can execute code."""
