"""The command line, hv. Talks to a host's daemon over HTTP; imports nothing heavy on the way to exec."""
