"""Who the pods are: sources that list them, and the registry that gives each a row in the shared tables."""
