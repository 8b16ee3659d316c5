//! Nodes as records, the index over them and the desired state computed from it.
