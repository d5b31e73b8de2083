"""KappaTune inside other trainers and from their recipes. A toolkit's module imports it; it isn't a dependency."""
