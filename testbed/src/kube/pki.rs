//! The certificates kubeadm would make: a CA each for the cluster, etcd and the front proxy, and what they sign.

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Value, json};

/// A certificate and its private key, PEM.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    pub(super) certificate: String,
    pub(super) key: String,
}

/// Who signs.
#[derive(Debug)]
pub(super) struct Authority {
    pub(super) pair: Pair,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(super) fn new(name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let pair = Pair { certificate: params.self_signed(&key)?.pem(), key: key.serialize_pem() };
        Ok(Self { pair, issuer: Issuer::new(params, key) })
    }

    /// A certificate for a client: Kubernetes takes the user from the common name, the groups from the organizations.
    pub(super) fn client(&self, user: &str, group: Option<&str>) -> Result<Pair> {
        self.sign(user, group, &[], &[ExtendedKeyUsagePurpose::ClientAuth])
    }

    /// A certificate for a server under these names and addresses.
    pub(super) fn server(&self, name: &str, group: Option<&str>, names: &[String]) -> Result<Pair> {
        self.sign(name, group, names, &[ExtendedKeyUsagePurpose::ServerAuth])
    }

    /// A certificate for who is both to its like.
    pub(super) fn peer(&self, name: &str, names: &[String]) -> Result<Pair> {
        let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(name, None, names, &both)
    }

    fn sign(
        &self,
        name: &str,
        group: Option<&str>,
        names: &[String],
        uses: &[ExtendedKeyUsagePurpose],
    ) -> Result<Pair> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.to_vec())
            .with_context(|| format!("a certificate for {name} cannot have the names {names:?}"))?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = uses.to_vec();
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Pair { certificate, key: key.serialize_pem() })
    }
}

/// A kubeconfig with a client certificate inside. JSON is YAML.
pub(super) fn kubeconfig(server: &str, authority: &Authority, user: &str, pair: &Pair) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "testbed", "cluster": {"server": server,
            "certificate-authority-data": STANDARD.encode(&authority.pair.certificate)}}],
        "users": [{"name": user, "user": {
            "client-certificate-data": STANDARD.encode(&pair.certificate),
            "client-key-data": STANDARD.encode(&pair.key)}}],
        "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": user}}],
        "current-context": "testbed",
    })
}

/// The key service account tokens are signed with: private and public part, PEM.
pub(super) fn token_key() -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    Ok((key.serialize_pem(), key.public_key_pem()))
}
