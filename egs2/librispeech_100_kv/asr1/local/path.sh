# Paths of your own, e.g. export PATH=/path/to/sctk/bin:${PATH}
