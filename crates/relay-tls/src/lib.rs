//! TLS to a relay, where UDP is blocked: what whoever connects takes for a relay.
//!
//! ```text
//!  TCP > TLS 1.3, any certificate > WireGuard's session, the relay's key > members' sealed messages
//! ```
//! Any certificate will do. Who the relay is, the session inside proves, against the key that the operator or the cluster
//! named, as it does over UDP (`docs/keyrelay-protocol.md`). TLS is there because such networks let it through; a
//! certificate of a public authority would cost each relay a name and a renewal, and prove less. Whoever stands between may
//! drop the connection and count its bytes, as they may with UDP's packets; what is sealed they neither read nor change. So
//! nothing may be sent into it that is not sealed.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

/// How to connect: TLS 1.3 alone, and nothing kept from one connection to the next.
pub fn client_config() -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let anybody = Anybody(provider.signature_verification_algorithms);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(anybody))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Takes any certificate whose key signed the handshake.
#[derive(Debug)]
struct Anybody(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // Not offered.
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use rustls::sign::{CertifiedKey, SingleCertAndKey};
    use rustls::version::{TLS12, TLS13};
    use rustls::{ClientConnection, ServerConfig, ServerConnection, SupportedProtocolVersion};

    use super::*;

    /// A handshake with a server that shows the certificate and signs with the key, of `name`s that nobody asked for.
    fn meet(
        version: &'static SupportedProtocolVersion,
        certificate: &rcgen::CertifiedKey<rcgen::KeyPair>,
        key: &rcgen::KeyPair,
    ) -> Result<(), Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = provider.key_provider.load_private_key(key)?;
        let shown = CertifiedKey::new(vec![certificate.cert.der().clone()], key);
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
        let mut server = ServerConnection::new(Arc::new(config))?;
        let name = ServerName::try_from("relay.example").expect("a name");
        let mut client = ClientConnection::new(Arc::new(client_config()?), name)?;
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).expect("written");
            server.read_tls(&mut &wire[..]).expect("read");
            server.process_new_packets()?;
            wire.clear();
            server.write_tls(&mut wire).expect("written");
            client.read_tls(&mut &wire[..]).expect("read");
            client.process_new_packets()?;
        }
        Ok(())
    }

    fn made(name: &str) -> rcgen::CertifiedKey<rcgen::KeyPair> {
        rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate")
    }

    #[test]
    fn a_certificate_made_by_itself_for_another_name_will_do() {
        let made = made("keyrelay");
        assert_eq!(meet(&TLS13, &made, &made.signing_key), Ok(()));
    }

    #[test]
    fn who_shows_the_certificate_of_another_is_refused() {
        let (shown, own) = (made("keyrelay"), made("keyrelay"));
        let refused = meet(&TLS13, &shown, &own.signing_key).expect_err("refused");
        assert!(matches!(refused, Error::InvalidCertificate(_)), "{refused:?}");
    }

    #[test]
    fn an_older_version_is_not_spoken() {
        let made = made("keyrelay");
        assert!(meet(&TLS12, &made, &made.signing_key).is_err());
    }
}
