use super::*;

fn listeners(n: usize) -> Vec<TcpListener> {
    (0..n).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect()
}

fn config(listeners: &[TcpListener], me: usize) -> MeshConfig {
    let id = |n: usize| MemberId(u16::try_from(n).unwrap());
    let peers = listeners.iter().enumerate().filter(|(n, _)| *n != me);
    MeshConfig {
        me: id(me),
        vm: "test".into(),
        epoch: Epoch(1),
        peers: peers.map(|(n, l)| (id(n), l.local_addr().unwrap())).collect(),
        secret: Some(b"secret".to_vec()),
        deadline: Duration::from_secs(10),
        channels: 2,
    }
}

type Spoil = fn(&mut MeshConfig);
type Results = Vec<Result<Vec<PeerLink>, MeshError>>;

fn run(listeners: Vec<TcpListener>, configs: Vec<MeshConfig>) -> Results {
    thread::scope(|scope| {
        let members: Vec<_> =
            listeners.into_iter().zip(configs).map(|(l, c)| scope.spawn(move || connect(l, &c))).collect();
        members.into_iter().map(|m| m.join().unwrap()).collect()
    })
}

#[test]
fn four_members_find_each_other() {
    let listeners = listeners(4);
    let configs = (0..4).map(|n| config(&listeners, n)).collect();
    let mut meshes: Vec<Vec<PeerLink>> = run(listeners, configs).into_iter().map(Result::unwrap).collect();
    for (n, mesh) in meshes.iter().enumerate() {
        let peers: Vec<usize> = mesh.iter().map(|l| usize::from(l.peer.0)).collect();
        assert_eq!(peers, (0..4).filter(|p| *p != n).collect::<Vec<_>>());
        assert!(mesh.iter().all(|l| l.streams.len() == 2));
    }
    // Channel 1 of member 3 towards member 0 is channel 1 of member 0 towards member 3.
    meshes[3][0].streams[1].write_all(b"hello").unwrap();
    let mut got = [0; 5];
    meshes[0][2].streams[1].read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
}

#[test]
fn strangers_do_not_disturb() {
    let listeners = listeners(2);
    let addr = listeners[0].local_addr().unwrap();
    let mut silent = TcpStream::connect(addr).unwrap();
    let mut rude = TcpStream::connect(addr).unwrap();
    rude.write_all(&[b'x'; 4096]).unwrap();
    let configs = vec![config(&listeners, 0), config(&listeners, 1)];
    let start = Instant::now();
    assert!(run(listeners, configs).iter().all(Result::is_ok));
    assert!(start.elapsed() < Duration::from_secs(3));
    let _ = silent.write_all(b"late");
}

#[test]
fn what_does_not_belong_together_is_refused_and_named() {
    let cases: [(Spoil, &str); 3] = [
        (|c| c.secret = Some(b"other".to_vec()), "secret"),
        (|c| c.vm = "other".into(), "another VM"),
        (|c| c.epoch = Epoch(2), "epoch"),
    ];
    for (spoil, word) in cases {
        let listeners = listeners(2);
        let mut configs = vec![config(&listeners, 0), config(&listeners, 1)];
        configs[0].deadline = Duration::from_millis(500);
        spoil(&mut configs[1]);
        let results = run(listeners, configs);
        for result in results {
            let text = result.expect_err(word).to_string();
            assert!(text.contains("member"), "{text}");
            assert!(text.contains(word), "{text}");
        }
    }
}

#[test]
fn a_member_that_does_not_come_is_named() {
    let listeners = listeners(2);
    let mut lower = config(&listeners, 0);
    lower.deadline = Duration::from_millis(200);
    let mut higher = config(&listeners, 1);
    higher.deadline = Duration::from_millis(200);
    let [first, second] = <[_; 2]>::try_from(listeners).unwrap();
    assert!(matches!(connect(first, &lower), Err(MeshError::Missing { peer: MemberId(1), .. })));
    assert!(matches!(connect(second, &higher), Err(MeshError::Unreachable { peer: MemberId(0), .. })));
}
