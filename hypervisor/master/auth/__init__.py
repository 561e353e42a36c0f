"""Who asks, and whether they may: certificate authority, authenticators, authorizers."""
