"""What every room uses: errors, plug-ins, files, manifests, keyed draws, progress, recipes, statistics."""
