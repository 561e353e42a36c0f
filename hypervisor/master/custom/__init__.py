"""Kinds that users define: CustomResourceDefinitions become rows of the table of kinds while the master runs."""
