"""Files of clients and of batches: what is known of each in Redis, its bytes in an object store that `fsspec` reaches."""
