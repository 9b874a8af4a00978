//! Compiles the contract without protoc: descriptors with every option kept, and typed code.

use std::{
    env,
    error::Error,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use prost::Message as _;
use prost_reflect::{DescriptorPool, MessageDescriptor, Value};

fn main() -> Result<(), Box<dyn Error>> {
    let mut files = Vec::new();
    for root in ["paperkey", "google", "buf"] {
        println!("cargo::rerun-if-changed={root}");
        collect(Path::new(root), &mut files)?;
    }
    files.sort();

    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(&files)?;
    // The raw bytes keep the custom options; prost's own FileDescriptorSet drops them.
    let bytes = compiler.encode_file_descriptor_set();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("contract.bin"), &bytes)?;

    let secretive = messages_with_secrets(&DescriptorPool::decode(bytes.as_slice())?)?;
    fs::write(out.join("redacted.rs"), redacted_debug(&secretive)?)?;

    let mut config = prost_build::Config::new();
    config.enable_type_names();
    let mut files = tonic_prost_build::FileDescriptorSet::decode(bytes.as_slice())?;
    // Only options speak in these packages, and options are read from the descriptors.
    files.file.retain(|file| {
        let name = file.name();
        name.starts_with("paperkey/") || name.starts_with("google/protobuf/")
    });
    tonic_prost_build::configure()
        .codec_path("crate::codec::ContractCodec")
        .include_file("contract.rs")
        .skip_debug(secretive.iter().map(|message| message.full_name().to_owned()))
        .compile_fds_with_config(files, config)?;
    Ok(())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            files.push(path);
        }
    }
    Ok(())
}

/// Messages whose derived `Debug` would print a secret.
fn messages_with_secrets(pool: &DescriptorPool) -> Result<Vec<MessageDescriptor>, Box<dyn Error>> {
    let presentation = pool
        .get_extension_by_name("paperkey.options.v1.presentation")
        .ok_or("paperkey.options.v1.presentation is not declared")?;
    Ok(pool
        .all_messages()
        .filter(|message| {
            message.fields().any(|field| {
                let options = field.options();
                options.get_extension(&presentation).as_message().is_some_and(|presentation| {
                    presentation.get_field_by_name("secret").as_deref() == Some(&Value::Bool(true))
                })
            })
        })
        .collect())
}

fn redacted_debug(messages: &[MessageDescriptor]) -> Result<String, std::fmt::Error> {
    let mut code = String::new();
    for message in messages {
        let module = message.package_name().replace('.', "::");
        let name = message.name();
        writeln!(
            code,
            "impl ::core::fmt::Debug for {module}::{name} {{\n    \
             fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {{\n        \
             f.debug_struct(\"{name}\").finish_non_exhaustive()\n    }}\n}}\n"
        )?;
    }
    Ok(code)
}
