"""Running Pyro models and guides: sites, isolation, minibatches, densities, noise."""
