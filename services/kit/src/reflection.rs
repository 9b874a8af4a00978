//! Reflection over the contract: its files as they were compiled, without the methods that are not shown here.
//!
//! The gateway shows what is public; a service's own port shows everything.
//!
//! Files are cut on the wire, not decoded and encoded again, so that options keep their values. `tonic-reflection`'s
//! own service would drop every custom option; its generated types and servers are used, its index is not.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    pin::Pin,
    sync::Arc,
};

use futures_util::{Stream, StreamExt as _};
use paperkey_proto::DESCRIPTORS;
use prost::{
    Message as _,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field},
};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, OneofDescriptorProto};
use tonic::{Request, Response, Status, Streaming, async_trait};
use tonic_reflection::{
    pb::{v1 as wire, v1alpha as old_wire},
    server::{
        v1::{ServerReflection, ServerReflectionServer},
        v1alpha::{ServerReflection as OldServerReflection, ServerReflectionServer as OldServerReflectionServer},
    },
};

use crate::service::Rpcs;

/// Field numbers of `google/protobuf/descriptor.proto`.
mod number {
    pub(super) const FILE_OF_SET: u32 = 1;
    pub(super) const SERVICE_OF_FILE: u32 = 6;
    pub(super) const SOURCE_INFO_OF_FILE: u32 = 9;
    pub(super) const NAME: u32 = 1;
    pub(super) const METHOD_OF_SERVICE: u32 = 2;
}

/// Adds reflection, both versions, over the methods whose path `is_shown`.
pub fn add_to(rpcs: Rpcs, is_shown: impl Fn(&str) -> bool) -> Result<Rpcs, Garbled> {
    let catalogue = Arc::new(Catalogue::of_public(DESCRIPTORS, is_shown)?);
    Ok(rpcs
        .add_service(ServerReflectionServer::new(Reflection(Arc::clone(&catalogue))))
        .add_service(OldServerReflectionServer::new(Reflection(catalogue))))
}

/// What reflection can tell.
#[derive(Debug, Default)]
struct Catalogue {
    /// Files by name, each with the names of its imports.
    files: HashMap<String, File>,
    /// The file that declares a symbol.
    symbols: HashMap<String, String>,
    /// The file that declares an extension, by type and number.
    extensions: BTreeMap<(String, i32), String>,
    services: BTreeSet<String>,
}

#[derive(Debug)]
struct File {
    bytes: Vec<u8>,
    imports: Vec<String>,
}

impl Catalogue {
    /// Reads a compiled contract, and keeps the methods whose path is public, and what they need.
    fn of_public(set: &[u8], is_public: impl Fn(&str) -> bool) -> Result<Self, Garbled> {
        let mut all = BTreeMap::new();
        let mut roots = Vec::new();
        edit(set, |field, bytes| {
            if field == number::FILE_OF_SET {
                let (name, file, decoded) = public_part(bytes, &is_public)?;
                if !decoded.service.is_empty() {
                    roots.push(name.clone());
                }
                all.insert(name, (file, decoded));
            }
            Ok(Part::Keep)
        })?;
        let mut catalogue = Self::default();
        for name in roots {
            catalogue.take(&mut all, name);
        }
        for set in [tonic_health::pb::FILE_DESCRIPTOR_SET, wire::FILE_DESCRIPTOR_SET, old_wire::FILE_DESCRIPTOR_SET] {
            let mut others = BTreeMap::new();
            edit(set, |field, bytes| {
                if field == number::FILE_OF_SET {
                    let (name, file, decoded) = public_part(bytes, &|_: &str| true)?;
                    others.insert(name, (file, decoded));
                }
                Ok(Part::Keep)
            })?;
            while let Some(name) = others.keys().next().cloned() {
                catalogue.take(&mut others, name);
            }
        }
        Ok(catalogue)
    }

    /// Takes a file over, and all that it imports.
    fn take(&mut self, all: &mut BTreeMap<String, (Vec<u8>, FileDescriptorProto)>, name: String) {
        let mut wanted = vec![name];
        while let Some(name) = wanted.pop() {
            let Some((bytes, file)) = all.remove(&name) else { continue };
            self.index(&name, &file);
            wanted.extend(file.dependency.iter().cloned());
            self.files.insert(name, File { bytes, imports: file.dependency });
        }
    }

    fn index(&mut self, name: &str, file: &FileDescriptorProto) {
        let package = file.package();
        let within = |parent: &str, name: &str| {
            if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
        };
        for message in &file.message_type {
            self.index_message(name, &within(package, message.name()), message);
        }
        for words in &file.enum_type {
            self.symbols.insert(within(package, words.name()), name.to_owned());
            for value in &words.value {
                self.symbols.insert(within(package, value.name()), name.to_owned());
            }
        }
        for service in &file.service {
            let service_name = within(package, service.name());
            for method in &service.method {
                self.symbols.insert(within(&service_name, method.name()), name.to_owned());
            }
            self.symbols.insert(service_name.clone(), name.to_owned());
            self.services.insert(service_name);
        }
        for extension in &file.extension {
            self.symbols.insert(within(package, extension.name()), name.to_owned());
            let of = extension.extendee().trim_start_matches('.').to_owned();
            self.extensions.insert((of, extension.number()), name.to_owned());
        }
    }

    fn index_message(&mut self, file: &str, full_name: &str, message: &DescriptorProto) {
        let fields = message.field.iter().map(FieldDescriptorProto::name);
        let names = fields.chain(message.oneof_decl.iter().map(OneofDescriptorProto::name));
        for name in names {
            self.symbols.insert(format!("{full_name}.{name}"), file.to_owned());
        }
        for words in &message.enum_type {
            self.symbols.insert(format!("{full_name}.{}", words.name()), file.to_owned());
        }
        for nested in &message.nested_type {
            self.index_message(file, &format!("{full_name}.{}", nested.name()), nested);
        }
        self.symbols.insert(full_name.to_owned(), file.to_owned());
    }

    /// A file and all that it imports, so that one question is enough.
    fn with_imports(&self, name: &str) -> Option<Vec<Vec<u8>>> {
        let mut files = vec![self.files.get(name)?];
        let mut seen = BTreeSet::from([name]);
        let mut at = 0;
        while let Some(file) = files.get(at) {
            let imports = file.imports.iter().filter(|import| seen.insert(import.as_str()));
            let imported: Vec<_> = imports.filter_map(|import| self.files.get(import)).collect();
            files.extend(imported);
            at += 1;
        }
        Some(files.into_iter().map(|file| file.bytes.clone()).collect())
    }

    fn answer(&self, request: wire::ServerReflectionRequest) -> wire::ServerReflectionResponse {
        use wire::{
            server_reflection_request::MessageRequest as Ask, server_reflection_response::MessageResponse as Tell,
        };
        let file = |name: Option<&str>| {
            name.and_then(|name| self.with_imports(name)).map(|file_descriptor_proto| {
                Tell::FileDescriptorResponse(wire::FileDescriptorResponse { file_descriptor_proto })
            })
        };
        let told = match &request.message_request {
            Some(Ask::FileByFilename(name)) => file(Some(name)),
            Some(Ask::FileContainingSymbol(symbol)) => {
                file(self.symbols.get(symbol.trim_start_matches('.')).map(String::as_str))
            }
            Some(Ask::FileContainingExtension(wanted)) => {
                let key = (wanted.containing_type.clone(), wanted.extension_number);
                file(self.extensions.get(&key).map(String::as_str))
            }
            Some(Ask::AllExtensionNumbersOfType(base_type_name)) => {
                let known = self.extensions.keys().filter(|(of, _)| of == base_type_name);
                Some(Tell::AllExtensionNumbersResponse(wire::ExtensionNumberResponse {
                    base_type_name: base_type_name.clone(),
                    extension_number: known.map(|(_, number)| *number).collect(),
                }))
            }
            Some(Ask::ListServices(_)) => {
                let service = self.services.iter().map(|name| wire::ServiceResponse { name: name.clone() }).collect();
                Some(Tell::ListServicesResponse(wire::ListServiceResponse { service }))
            }
            None => None,
        };
        let unknown = || {
            Tell::ErrorResponse(wire::ErrorResponse {
                error_code: tonic::Code::NotFound as i32,
                error_message: "nothing public has that name".to_owned(),
            })
        };
        wire::ServerReflectionResponse {
            valid_host: request.host.clone(),
            message_response: Some(told.unwrap_or_else(unknown)),
            original_request: Some(request),
        }
    }
}

/// The service itself.
#[derive(Debug)]
struct Reflection(Arc<Catalogue>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait]
impl ServerReflection for Reflection {
    type ServerReflectionInfoStream = Answers<wire::ServerReflectionResponse>;

    async fn server_reflection_info(
        &self,
        request: Request<Streaming<wire::ServerReflectionRequest>>,
    ) -> Result<Response<Self::ServerReflectionInfoStream>, Status> {
        let catalogue = Arc::clone(&self.0);
        let answers = request.into_inner().map(move |asked| Ok(catalogue.answer(asked?)));
        Ok(Response::new(Box::pin(answers)))
    }
}

#[async_trait]
impl OldServerReflection for Reflection {
    type ServerReflectionInfoStream = Answers<old_wire::ServerReflectionResponse>;

    async fn server_reflection_info(
        &self,
        request: Request<Streaming<old_wire::ServerReflectionRequest>>,
    ) -> Result<Response<Self::ServerReflectionInfoStream>, Status> {
        let catalogue = Arc::clone(&self.0);
        // The two versions differ in the name of their package and in nothing on the wire.
        let answers = request.into_inner().map(move |asked| {
            let same = |_| Status::internal("the versions of reflection differ");
            let asked = wire::ServerReflectionRequest::decode(asked?.encode_to_vec().as_slice()).map_err(same)?;
            let answer = catalogue.answer(asked).encode_to_vec();
            old_wire::ServerReflectionResponse::decode(answer.as_slice()).map_err(same)
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// The bytes are no descriptors.
#[derive(Debug, thiserror::Error)]
#[error("the compiled contract cannot be read")]
pub struct Garbled;

/// What becomes of a field.
enum Part {
    Keep,
    Drop,
    Replace(Vec<u8>),
}

/// A file without its source information and without what is not public.
fn public_part(
    bytes: &[u8],
    is_public: &impl Fn(&str) -> bool,
) -> Result<(String, Vec<u8>, FileDescriptorProto), Garbled> {
    let decoded = FileDescriptorProto::decode(bytes).map_err(|_| Garbled)?;
    let package = decoded.package().to_owned();
    let cut = edit(bytes, |field, value| {
        Ok(match field {
            number::SOURCE_INFO_OF_FILE => Part::Drop,
            number::SERVICE_OF_FILE => match public_service(value, &package, is_public)? {
                Some(service) => Part::Replace(service),
                None => Part::Drop,
            },
            _ => Part::Keep,
        })
    })?;
    let decoded = FileDescriptorProto::decode(cut.as_slice()).map_err(|_| Garbled)?;
    Ok((decoded.name().to_owned(), cut, decoded))
}

fn public_service(bytes: &[u8], package: &str, is_public: &impl Fn(&str) -> bool) -> Result<Option<Vec<u8>>, Garbled> {
    let service = name_of(bytes)?;
    let mut kept = 0;
    let cut = edit(bytes, |field, value| {
        if field == number::METHOD_OF_SERVICE {
            if !is_public(&format!("/{package}.{service}/{}", name_of(value)?)) {
                return Ok(Part::Drop);
            }
            kept += 1;
        }
        Ok(Part::Keep)
    })?;
    Ok((kept > 0).then_some(cut))
}

fn name_of(bytes: &[u8]) -> Result<String, Garbled> {
    let mut name = String::new();
    edit(bytes, |field, value| {
        if field == number::NAME {
            name = String::from_utf8(value.to_vec()).map_err(|_| Garbled)?;
        }
        Ok(Part::Keep)
    })?;
    Ok(name)
}

/// Copies a message, asking of each field that is a run of bytes what becomes of it.
fn edit(bytes: &[u8], mut decide: impl FnMut(u32, &[u8]) -> Result<Part, Garbled>) -> Result<Vec<u8>, Garbled> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while !rest.is_empty() {
        let before = rest;
        let (field, wire_type) = decode_key(&mut rest).map_err(|_| Garbled)?;
        let part = if wire_type == WireType::LengthDelimited {
            let length = decode_varint(&mut rest).map_err(|_| Garbled)?;
            let length = usize::try_from(length).map_err(|_| Garbled)?;
            let (value, after) = rest.split_at_checked(length).ok_or(Garbled)?;
            rest = after;
            decide(field, value)?
        } else {
            skip_field(wire_type, field, &mut rest, DecodeContext::default()).map_err(|_| Garbled)?;
            Part::Keep
        };
        match part {
            Part::Keep => out.extend_from_slice(&before[..before.len() - rest.len()]),
            Part::Drop => {}
            Part::Replace(value) => {
                encode_key(field, WireType::LengthDelimited, &mut out);
                encode_varint(value.len() as u64, &mut out);
                out.extend_from_slice(&value);
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use paperkey_proto::Contract;
    use prost_reflect::DescriptorPool;
    use wire::{
        ServerReflectionRequest, server_reflection_request::MessageRequest as Ask,
        server_reflection_response::MessageResponse as Tell,
    };

    use super::*;

    fn catalogue() -> Catalogue {
        let is_public = |path: &str| Contract::get().method(path).is_some_and(|method| method.is_public());
        Catalogue::of_public(DESCRIPTORS, is_public).unwrap()
    }

    fn told(catalogue: &Catalogue, ask: Ask) -> Tell {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(ask) };
        catalogue.answer(request).message_response.unwrap()
    }

    #[test]
    fn public_services_are_listed_and_no_others() {
        let Tell::ListServicesResponse(list) = told(&catalogue(), Ask::ListServices(String::new())) else {
            panic!("a list was asked for")
        };
        let listed: BTreeSet<_> = list.service.into_iter().map(|service| service.name).collect();
        let contract = Contract::get().methods().iter().filter(|method| method.is_public());
        let mut expected: BTreeSet<_> = contract.map(|method| method.service.clone()).collect();
        expected.extend(
            [
                "grpc.health.v1.Health",
                "grpc.reflection.v1.ServerReflection",
                "grpc.reflection.v1alpha.ServerReflection",
            ]
            .map(str::to_owned),
        );
        assert_eq!(listed, expected);
    }

    #[test]
    fn a_symbol_is_answered_with_files_that_stand_alone_and_keep_their_options() {
        let catalogue = catalogue();
        for method in Contract::get().methods().iter().filter(|method| method.is_public()) {
            let Tell::FileDescriptorResponse(files) =
                told(&catalogue, Ask::FileContainingSymbol(method.service.clone()))
            else {
                panic!("{} is not told", method.service)
            };
            let mut pool = DescriptorPool::new();
            let mut set = Vec::new();
            for file in &files.file_descriptor_proto {
                encode_key(1, WireType::LengthDelimited, &mut set);
                encode_varint(file.len() as u64, &mut set);
                set.extend_from_slice(file);
            }
            pool.decode_file_descriptor_set(set.as_slice()).unwrap();
            let service = pool.get_service_by_name(&method.service).unwrap();
            let same = service.methods().find(|other| other.name() == method.descriptor.name()).unwrap();
            let policy = pool.get_extension_by_name("paperkey.options.v1.policy").unwrap();
            assert!(same.options().has_extension(&policy), "{} lost its policy", method.path);
        }
    }

    #[test]
    fn internal_things_have_no_name_here() {
        let catalogue = catalogue();
        for method in Contract::get().methods().iter().filter(|method| !method.is_public()) {
            for symbol in [&method.service, method.descriptor.input().full_name()] {
                let answer = told(&catalogue, Ask::FileContainingSymbol(symbol.to_owned()));
                assert!(matches!(answer, Tell::ErrorResponse(_)), "{symbol}");
            }
        }
        assert!(catalogue.files.keys().all(|name| !name.contains("internal")));
    }
}
