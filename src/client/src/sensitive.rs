//! A gRPC codec that overwrites the key material of a request after encoding it.
//!
//! prost drops a message without overwriting it. This codec overwrites the key material after the message was
//! encoded, or when an unsent message is dropped. The documentation of the crate lists the copies that this codec
//! cannot overwrite.

use keybroker_proto as proto;
use prost::Message;
use tonic::{
    Request, Response, Status,
    client::Grpc,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};
use tonic_prost::ProstCodec;
use zeroize::Zeroize as _;

/// A message that can overwrite its secrets.
pub(crate) trait Wipe: Message {
    fn wipe(&mut self);
}

impl Wipe for proto::CreateUserKeyRequest {
    fn wipe(&mut self) {
        self.key_material.zeroize();
    }
}

impl Wipe for proto::ReplaceUserKeyRequest {
    fn wipe(&mut self) {
        self.key_material.zeroize();
    }
}

/// Overwrites the secrets of the message when it is dropped.
pub(crate) struct Sensitive<M: Wipe>(pub(crate) M);

impl<M: Wipe> Drop for Sensitive<M> {
    fn drop(&mut self) {
        self.0.wipe();
    }
}

/// Makes a unary call and overwrites the secrets of its request.
pub(crate) async fn unary<M, R>(
    channel: Channel,
    request: Request<Sensitive<M>>,
    path: &'static str,
) -> Result<Response<R>, Status>
where
    M: Wipe + Send + Sync + 'static,
    R: Message + Default + Send + Sync + 'static,
{
    let mut grpc = Grpc::new(channel);
    grpc.ready()
        .await
        .map_err(|error| Status::from_error(error.into()))?;
    let codec = SensitiveCodec(ProstCodec::<M, R>::default());
    grpc.unary(request, PathAndQuery::from_static(path), codec)
        .await
}

struct SensitiveCodec<M, R>(ProstCodec<M, R>);

impl<M, R> Codec for SensitiveCodec<M, R>
where
    M: Wipe + Send + 'static,
    R: Message + Default + Send + 'static,
{
    type Encode = Sensitive<M>;
    type Decode = R;
    type Encoder = SensitiveEncoder<M>;
    type Decoder = <ProstCodec<M, R> as Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        SensitiveEncoder(std::marker::PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        self.0.decoder()
    }
}

struct SensitiveEncoder<M>(std::marker::PhantomData<fn(M)>);

impl<M: Wipe> Encoder for SensitiveEncoder<M> {
    type Item = Sensitive<M>;
    type Error = Status;

    fn encode(&mut self, item: Self::Item, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.0
            .encode(target)
            .map_err(|_| Status::internal("the message does not fit into its buffer"))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wiping_leaves_no_material() {
        let mut create = proto::CreateUserKeyRequest {
            key_material: vec![7; 32],
            ..Default::default()
        };
        create.wipe();
        assert!(create.key_material.is_empty());
        let mut replace = proto::ReplaceUserKeyRequest {
            key_material: vec![7; 32],
            ..Default::default()
        };
        replace.wipe();
        assert!(replace.key_material.is_empty());
    }
}
