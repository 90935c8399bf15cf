"""Token stores on disk: their files, their manifests, and the data sets opened from them."""
