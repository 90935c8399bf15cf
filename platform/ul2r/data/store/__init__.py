"""What lies on disk: token stores, their manifests, and data sets made of them."""
