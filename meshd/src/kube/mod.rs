//! Kubernetes: the Node watch and the publishing of our own record.
