//! stub
pub fn run(_c:&crate::context::Context){}
