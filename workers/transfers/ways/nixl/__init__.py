"""The way `nixl`: NIXL's agents read the owner's arena, over RDMA where the network has it."""
