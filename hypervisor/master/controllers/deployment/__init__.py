"""Deployments: ReplicaSets that follow each other, with as little gap as the strategy allows."""
