//! What was last known of the cluster, on disk for a start without the API server.
