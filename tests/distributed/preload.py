"""What the fork server does before its first fork: prepare the libraries, as a run does before it imports them."""

from imdm_scale.parallel.compat import prepare_libraries

prepare_libraries()
